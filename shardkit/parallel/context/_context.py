"""Context parallelism: splits the length of every row; only attention communicates.

`q[B, T_context, N, H] · k[B, S, K, H] → y[B, T_context, N, H]`, K and V arrive block by block.

Collectives per layer, n devices, Q and KV bytes of one device's block of queries, and of keys and
values together:

- ring: n−1 blocks of K and V forward; K, V and their gradients (in f32) backward:
  3(n−1) · KV. Under a causal mask the zig-zag order that gives every device the same work costs a
  swap of half of q, k, v and the output, and of their gradients, with one partner: 2Q + KV. A
  window that is an int reaches b = ⌈(window − 1) / block⌉ blocks: where that is less than n−1, only
  these are sent, 3b · KV, and there is no swap.
- all-to-all: q, k, v and the output exchange length for heads and back, forward and backward:
  (n−1)/n · 2(2Q + KV).

Gradients of weights that are not split are reduced over the axis too, as over `data`, but with
accumulation once for every micro-batch: a gradient shard holds whole rows. Full remat repeats the
forward exchanges; `remat="save:attn_mix"` keeps the output and repeats only the moves of q, k, v.

Use when the activations of one row do not fit, or when there are fewer rows than devices. Ring: for
any number of heads and long lengths (a block's products must take longer than its transfer).
All-to-all: fewer bytes from about n = 4 on, up to as many devices as there are key heads, or their
multiple with `kv_heads="replicate"`. Do not use for short rows: split the batch (`data`, `fsdp`).

Inside a stage of a pipeline the devices of other stages do something else, and a permute over all
of them would deadlock on some backends: there blocks are exchanged in pairs of devices
(`_pairwise`), with the same bytes; the number of devices must be even.

The zig-zag swap is made in every layer, not once in the batch. A batch in zig-zag order would send
only 12 bytes a token, but every model would have to take its positions from elsewhere, draw its
dropout elsewhere and never read its neighbours along the length; a model that does not would be
silently wrong. The swap is 2Q + KV of 3(n−1) · KV: 10 % at n = 8 with as many key heads as heads,
1 % at n = 64.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, final

from jax.sharding import PartitionSpec

from ...report import LedgerRow, Program
from ...rules import REPLICATED
from .._kind import Kind, PlanChoice, spare_share
from .._names import activations, check_strategy, choice_problems
from .._strategy import Strategy
from ._attention import LAYOUTS, ContextAttention


def ring_bytes(n: int, keys_and_values: float, layers: int) -> float:
    """Bytes per device: blocks of K and V forward; K, V and their gradients backward.

    In a ring of n devices each has K and V of one block of the length.

    >>> ring_bytes(4, 1000, 1)
    9000.0
    """
    return 3.0 * (n - 1) * keys_and_values * layers


def all_to_all_bytes(n: int, queries: float, keys_and_values: float, layers: int) -> float:
    """Bytes per device: q, k, v and outputs exchange length for heads and back, in both passes.

    Among n devices each has queries, or outputs, and K and V of one block of the length.

    >>> all_to_all_bytes(4, 1000, 1000, 1)
    4500.0
    """
    return 2 * (n - 1) / n * (2 * queries + keys_and_values) * layers


def context(axis: str = "context", attention: str = "ring", *, kv_heads: str = "split") -> Strategy:
    """Splits the length of every row over a mesh axis; parameters are replicated.

    Args:
      axis: name of the mesh axis.
      attention: `"ring"`: keys and values rotate; `"all_to_all"`: attention splits heads instead.
      kv_heads: with `"split"` key heads that the devices do not divide are an error;
        `"replicate"` repeats them until they divide.

    Returns:
      A strategy for models that call `sk.nn.attention`, or mark their own attention with
      `sk.nn.overridable("attention", ...)`. Dim 1 of every batch leaf that has one is the length;
      models with logical names call it `length`, and `residual_length` between blocks.

    Raises:
      StepError: an option is none of these.

    >>> from shardkit.parallel import strategies
    >>> both = strategies.fsdp() | context()
    >>> both.batch, both.activations.spec(("batch", "length", "embed"))
    (P('fsdp', 'context'), P('fsdp', 'context'))
    """
    problems = choice_problems(
        attention=(attention, LAYOUTS), kv_heads=(kv_heads, ("split", "replicate"))
    )
    check_strategy("context", axis, problems)
    return Strategy(
        params=REPLICATED,
        batch=PartitionSpec(None, axis),
        activations=activations({"length": axis, "residual_length": axis}),
        kinds=(Context(axis, attention),),
        overrides=(("attention", ContextAttention(axis, attention, kv_heads)),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Context(Kind):
    """The length split over an axis.

    Attributes:
      attention: `"ring"` or `"all_to_all"`.
    """

    name: ClassVar[str] = "context"
    splits = frozenset({"length"})
    collectives = frozenset({"all-reduce", "all-gather", "collective-permute", "all-to-all"})
    override = "attention"
    planned = "context"
    factory = staticmethod(context)
    attention: str = "ring"

    @property
    def variant(self) -> str:
        """How attention exchanges, where it is not the ring."""
        return "" if self.attention == "ring" else self.attention

    @property
    def plan_choice(self) -> PlanChoice:
        """How attention exchanges, which a planner has formulae for."""
        return PlanChoice(attention=self.attention)

    def minimum(self, program: Program) -> float | None:
        """Liu et al. 2023 (ring), Jacobs et al. 2023; and gradients reduced as for `data`."""
        attended = self._attention_bytes(program)
        return None if attended is None else self.gradient_all_reduce_bytes(program) + attended

    def _attention_bytes(self, program: Program) -> float | None:
        n, layers = program.sizes[self.axis], program.layers
        queries, keys = map(program.activation_bytes, ("heads", "kv_heads"))
        if queries is None or keys is None or layers is None:
            return None
        if self.attention == "ring":
            blocks = program.declared.ring_blocks
            return ring_bytes(n if blocks is None else blocks + 1, 2 * keys, layers)
        return all_to_all_bytes(n, queries, 2 * keys, layers)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """What attention passes beside its blocks, as a ring's swap for equal causal work."""
        attended = self._attention_bytes(program)
        if row.kind in ("collective-permute", "all-to-all") and attended is not None:
            yield "beside attention's blocks, as for equal work", spare_share(row, rows, attended)

    def planned_options(self, choice: PlanChoice) -> dict[str, Any]:
        """The chosen attention."""
        return {"attention": choice.attention or "ring"}
