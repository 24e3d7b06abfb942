"""Context parallelism: the length of every row is split; attention alone looks across.

`q[B, T_context, N, H] · k[B, S, K, H] → y[B, T_context, N, H]`, k and v fetched block by block.

Collectives per layer, n devices, Q and KV bytes of one device's block of queries, and of keys and
values together:

- ring: n−1 blocks of K and V forward; K, V and their gradients (these in f32) backward:
  3(n−1) · KV. Under a causal mask the zig-zag order that gives every device the same work costs a
  swap of half of q, k, v and the output, and of their gradients, with one partner: 2Q + KV.
- all-to-all: q, k, v and the output exchange length for heads and back, forward and backward:
  (n−1)/n · 2(2Q + KV).

Gradients of weights that are not split are reduced over the axis too, as over `data`, but with
accumulation once for every micro-batch: a lane holds whole rows. Full remat repeats the forward
exchanges; `remat="save:attn_mix"` keeps the output and repeats only the moves of q, k and v.

Use when the activations of one row do not fit, or when there are fewer rows than devices. Ring: for
any number of heads, long lengths (a block's products must outlast its transfer). All-to-all: fewer
bytes from about n = 4 on, up to as many devices as there are key heads, or their multiple with
`kv_heads="replicate"`. Do not use for short rows: split the batch (`data`, `fsdp`).

Inside a stage of a pipeline, where devices of other stages do something else, a permute over all
of them would wait for ever on some backends: there the ring's blocks are swapped in pairs of
devices (`collectives/_pairs`), with the same bytes and an even number of devices.

The swap stands in the override, layer by layer, and not in the batch, once. A batch whose tokens
are in zig-zag order would move nothing but 12 bytes a token, but every model would then have to ask
for its positions, draw its dropout elsewhere and never look at its neighbours along the length;
one that does not would be silently wrong. The swap is 2Q + KV of 3(n−1) · KV: with as many key
heads as heads 10 % at n = 8, 1 % at n = 64.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..._core.errors import Problem, ShardingError, StepError, did_you_mean, raise_all
from ..._core.tree import short_type
from ...nn._overridable import Override, StepContext, manual_axes
from ...report import Program
from ...rules import REPLICATED, axes_of, format_mesh
from .._kind import Choice, Kind
from .._names import activations, check_axis
from .._strategy import Strategy
from ._attention import across
from ._attention_layout import Way
from ._pairwise import Pairs
from ._ring import Ring
from ._ulysses import HeadExchange

_WAYS: dict[str, type[Way]] = {"ring": Ring, "all_to_all": HeadExchange}
_KV_HEADS = ("split", "replicate")


def ring_bytes(n: int, keys_and_values: float, layers: int) -> float:
    """Blocks of K and V travel round the ring forward; K, V and their gradients backward.

    Args:
      n: devices in the ring.
      keys_and_values: bytes of K and V of one device's block of the length.
      layers: attention layers.

    >>> ring_bytes(4, 1000, 1)
    9000.0
    """
    return 3.0 * (n - 1) * keys_and_values * layers


def all_to_all_bytes(n: int, queries: float, keys_and_values: float, layers: int) -> float:
    """Queries, keys, values and outputs change length for heads and back, in both passes.

    Args:
      n: devices that share a length.
      queries: bytes of the queries of one device's block of the length, or of its outputs.
      keys_and_values: bytes of its K and V.
      layers: attention layers.

    >>> all_to_all_bytes(4, 1000, 1000, 1)
    4500.0
    """
    return 2 * (n - 1) / n * (2 * queries + keys_and_values) * layers


@dataclasses.dataclass(frozen=True)
class ContextAttention(Override):
    """Attention over a length that `axis` splits.

    Attributes:
      attention: `"ring"` or `"all_to_all"`.
      kv_heads: `"split"` or `"replicate"`, see `context`.
    """

    attention: str = "ring"
    kv_heads: str = "split"

    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns what `plain` would, which is `sk.nn.attention` of one device."""
        return self._attend(around, *args, **kwargs)

    def _attend(
        self,
        around: StepContext,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        causal: bool,
        implementation: str,
    ) -> jax.Array:
        """Attends; the blocks have a kernel of their own, whatever `implementation` says."""
        heads = _split(around, "heads")
        ways = math.prod(around.mesh.shape[axis] for axis in heads)
        if self.attention == "all_to_all":
            ways *= around.mesh.shape[self.axis]
        whole = self.kv_heads == "replicate" or _split(around, "kv_heads") != heads
        problems = self._length_problems(around, q, k, segment_ids, causal)
        problems += self._head_problems(q, k, ways, whole)
        headline = f"Attention cannot be split on mesh {format_mesh(around.mesh.shape)}."
        raise_all(ShardingError, headline, problems)
        if repeats := math.lcm(k.shape[2], ways) // k.shape[2] - 1:
            k, v = (jnp.repeat(x, repeats + 1, axis=2) for x in (k, v))
        way = self._way(around.mesh, self.axis, around.free_rows, heads, around.lanes)
        return across(q, k, v, segment_ids, causal, way)

    @property
    def _way(self) -> type[Way]:
        """Inside a stage of a pipeline other stages do something else: no permute over all."""
        return Pairs if self.attention == "ring" and manual_axes() else _WAYS[self.attention]

    def _length_problems(
        self,
        around: StepContext,
        q: jax.Array,
        k: jax.Array,
        segment_ids: jax.Array | None,
        causal: bool,
    ) -> list[Problem]:
        length, n = q.shape[1], around.mesh.shape[self.axis]
        pieces = 2 * n if causal and self.attention == "ring" else n
        problems = []
        if length % pieces:
            cut = f"{pieces} pieces, two a device" if pieces > n else f"{n} pieces"
            why = f"length {length} does not split into {cut} ({self.axis}={n})"
            near = max(pieces, round(length / pieces) * pieces)
            problems.append(Problem(f"queries {_type(q)}", why, f"a length of {near}"))
        if self._way is Pairs and n % 2:
            why = f"a ring of {self.axis}={n} inside a stage: its devices meet in pairs"
            fix = f"{self.axis}={n + 1}, or strategies.context(attention='all_to_all')"
            problems.append(Problem("attention='ring'", why, fix))
        if k.shape[1] != length:
            why = f"{k.shape[1]} keys for {length} queries; a split length is one and the same"
            problems.append(Problem(f"keys {_type(k)}", why, "attention of a row on itself"))
        if segment_ids is not None and segment_ids.shape != q.shape[:2]:
            why = f"not one id per token of {_type(q)}"
            fix = f"segment_ids of shape {q.shape[:2]}"
            problems.append(Problem(f"segment_ids {_type(segment_ids)}", why, fix))
        return problems

    def _head_problems(self, q: jax.Array, k: jax.Array, ways: int, whole: bool) -> list[Problem]:
        heads, key_heads = q.shape[2], k.shape[2]
        split = f"split {ways} ways by {self.attention} attention and the axes of heads"
        if heads % ways:
            fits = [d for d in range(1, heads + 1) if heads % d == 0]
            why = f"{heads} heads cannot be {split}"
            legal = ", ".join(map(str, fits))
            fix = f"{math.lcm(heads, ways)} heads, or {legal} ways in all, or attention='ring'"
            return [Problem(f"queries {_type(q)}", why, fix)]
        if key_heads % ways and not whole:
            why = f"{key_heads} key heads cannot be {split}"
            more = math.lcm(key_heads, ways)
            fix = f"kv_heads={more} in the model, or strategies.context(kv_heads='replicate')"
            return [Problem(f"keys {_type(k)}", why, fix)]
        return []


def context(axis: str = "context", attention: str = "ring", *, kv_heads: str = "split") -> Strategy:
    """Splits the length of every row over a mesh axis; parameters are replicated.

    Args:
      axis: name of the mesh axis.
      attention: `"ring"`: keys and values travel; `"all_to_all"`: heads are split in attention.
      kv_heads: `"replicate"` repeats key heads as often as it takes to split them; `"split"`
        makes an error of those that do not divide.

    Returns:
      A strategy for models whose attention is `sk.nn.attention`, or that mark their own as the
      region `"attention"`. Dim 1 of every batch leaf that has one is the length. A model with
      logical names calls it `length`, and `residual_length` between blocks.

    Raises:
      StepError: an option is none of these.

    >>> from shardkit.parallel import strategies
    >>> both = strategies.fsdp() | context()
    >>> both.batch, both.activations.spec(("batch", "length", "embed"))
    (P('fsdp', 'context'), P('fsdp', 'context'))
    """
    check_axis("context", axis)
    known = {"attention": (attention, tuple(_WAYS)), "kv_heads": (kv_heads, _KV_HEADS)}
    problems = [
        Problem(
            f"{name}={given!r}",
            f"known: {', '.join(map(repr, legal))}.{did_you_mean(str(given), legal)}",
            f"context({name}={legal[0]!r})",
        )
        for name, (given, legal) in known.items()
        if given not in legal
    ]
    raise_all(StepError, "Context parallelism is declared wrongly.", problems)
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
    """The length over an axis.

    Attributes:
      attention: `"ring"` or `"all_to_all"`.
    """

    name: ClassVar[str] = "context"
    splits = frozenset({"length"})
    collectives = frozenset({"all-reduce", "all-gather", "collective-permute", "all-to-all"})
    override = "attention"
    weighed = "context"
    make = staticmethod(context)
    attention: str = "ring"

    @property
    def variant(self) -> str:
        """How attention looks across, where it is not the ring."""
        return "" if self.attention == "ring" else self.attention

    @property
    def choice(self) -> Choice:
        """How attention looks across, whose exchanges a planner has formulae for."""
        return Choice(attention=self.attention)

    def minimum(self, program: Program) -> float | None:
        """Liu et al. 2023 (ring), Jacobs et al. 2023; and gradients reduced as for `data`."""
        n, layers = program.sizes[self.axis], program.layers
        queries, keys = map(program.activation_bytes, ("heads", "kv_heads"))
        if queries is None or keys is None or layers is None:
            return None
        if self.attention == "ring":
            return self.reduced_bytes(program) + ring_bytes(n, 2 * keys, layers)
        return self.reduced_bytes(program) + all_to_all_bytes(n, queries, 2 * keys, layers)

    def options(self, choice: Choice) -> dict[str, Any]:
        """Attention as it is chosen."""
        return {"attention": choice.attention or "ring"}


def _split(around: StepContext, name: str) -> tuple[str, ...]:
    """Mesh axes that split a dim of activations; one that the mesh lacks is reported elsewhere."""
    axes = axes_of(around.spec((name,))[0])
    return tuple(axis for axis in axes if axis in around.mesh.shape)


def _type(x: jax.Array) -> str:
    return short_type(x.shape, x.dtype)
