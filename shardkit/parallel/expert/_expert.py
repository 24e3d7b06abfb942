"""Expert parallelism: splits experts over a mesh axis; tokens are sent to them and back.

`x[B_expert, T, D] → h[X_expert, C, D] · W[X_expert, D, F] → y[X_expert, C, D] → z[B_expert, T, D]`

Collectives per layer, n devices, R bytes of routed tokens on one device (k choices of each token,
or the slots of all experts): two all-to-alls forward and two backward, 4(n−1)/n · R per device.
Without a capacity ("dropless") all tokens could go to one device, so every device has capacity for
all of them: a padded exchange sends all of it, n · R. The rest of the model sees `expert` as one
more axis of data parallelism; gradients of experts are not reduced over it.

With a capacity, the exchange is an all-to-all of equal parts. Dropless, it is
`jax.lax.ragged_all_to_all` on TPUs and GPUs, (n−1)/n · R when balanced; on CPUs, whose compiler
lacks it, and in a stage of a pipeline, which is manual over its own axis only, it is padded to the
capacity. Dropless products are `jax.lax.ragged_dot` on all platforms.

Drops are counted per row of the batch, not per device or mesh: where routers choose alike, one
device and every mesh drop the same tokens. With a capacity, runs on two meshes can diverge once
accumulated rounding turns one router's tie, because a token that moves can push later ones of its
row out of their slots. `benchmarks/results/expert_tie.md` lists the tokens where that first
happens, and shows that one device computes the mesh's loss from the mesh's weights.

Use when a mixture's experts do not fit on one device, and each gets enough tokens to keep a device
busy. Do not use across slow links, where every layer waits four times for every token.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, final

import jax
from jax.sharding import PartitionSpec

from ..._core.errors import Problem, StepError, raise_all
from ..._core.types import Params
from ...nn._expert_dispatch import combine, draw_row_words
from ...nn._overridable import Override, StepContext
from ...report import LedgerRow, Program
from .._kind import Kind, spare_share
from .._names import activations, check_strategy, params
from .._strategy import Strategy
from ._dispatch import ExpertGroups, Mlp
from ._padded import run_dropless_padded, run_with_capacity
from ._ragged import PLATFORMS, run_dropless_ragged


def expert_bytes(n: int, routed: float, layers: int) -> float:
    """Bytes per device: two all-to-alls of the routed tokens forward and two backward per layer.

    >>> expert_bytes(4, 1000, 1)
    3000.0
    """
    return 4 * (n - 1) / n * routed * layers


def expert(axis: str = "expert") -> Strategy:
    """Splits experts, and the rows of the batch, over a mesh axis.

    Args:
      axis: name of the mesh axis.

    Returns:
      A strategy for models whose parameters name an `experts` dim and that call `sk.nn.experts`.
      Combine it with others last, so that the rows of one gradient shard are adjacent.

    >>> expert().params.spec(("layers", "experts", "embed", "expert_mlp"))
    P(None, 'expert')
    """
    check_strategy("expert", axis)
    return Strategy(
        params=params({"experts": axis}),
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(Expert(axis),),
        overrides=(("experts", ExpertExchange(axis)),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Expert(Kind):
    """Experts and rows split over an axis."""

    name: ClassVar[str] = "expert"
    splits = frozenset({"rows", "experts"})
    collectives = frozenset({"all-reduce", "all-to-all", "ragged-all-to-all"})
    override = "experts"
    planned = "bounded experts"
    not_planned = ("dropless experts",)
    factory = staticmethod(expert)

    def shares_axis(self, other: Kind) -> bool:
        """Experts can share an axis with rows: routed tokens are sent between its devices."""
        return "rows" in other.splits and "experts" not in other.splits

    def minimum(self, program: Program) -> float | None:
        """Lepikhin et al. 2020; and gradients of the other parameters, reduced as for `data`."""
        routed = self._routed_bytes(program)
        return None if routed is None else self.gradient_all_reduce_bytes(program) + routed

    def _routed_bytes(self, program: Program) -> float | None:
        activation, choices = program.declared.activation_bytes, program.declared.choices
        if activation is None or choices is None or program.layers is None:
            return None
        return expert_bytes(program.sizes[self.axis], activation * choices, program.layers)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """Room for more tokens than are routed."""
        routed = self._routed_bytes(program)
        if row.kind == "all-to-all" and routed is not None:
            yield "of room for tokens that no expert gets", spare_share(row, rows, routed)


@final
@dataclasses.dataclass(frozen=True)
class ExpertExchange(Override):
    """Overrides `sk.nn.experts`: every device sends tokens to the devices that hold their experts.

    Two constraints state the exchange, one splitting by sender, one by receiver; the partitioner
    implements them as an all-to-all. A `shard_map` over this axis alone would not do: XLA gathers
    the operand of its all-to-all over every axis that is left to the partitioner.
    """

    @property
    def moves_rows(self) -> bool:
        """Tokens leave their device."""
        return True

    def __call__(self, around: StepContext, plain: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns what `plain(x, choice, share, weights, mlp, capacity)` would.

        Raises StepError if the axis does not divide the number of experts.
        """
        return _run_experts(ExpertGroups(around, self.axis), *args, **kwargs)


def _run_experts(
    groups: ExpertGroups,
    x_BTE: jax.Array,
    choice_BTK: jax.Array,
    share_BTK: jax.Array,
    weights: Params,
    mlp: Mlp,
    capacity: int | None,
    key: jax.Array | None,
) -> jax.Array:
    number = jax.tree.leaves(weights)[0].shape[0]
    _check_divisible(groups.axis, groups.devices, number)
    arrays = x_BTE, choice_BTK, share_BTK, draw_row_words(key, choice_BTK)
    x_GBTE, choice_GBTK, share_GBTK, words = jax.tree.map(groups.split_groups, arrays)

    def run_mlp(rows: jax.Array, dot: Any, keys: jax.Array | None) -> jax.Array:
        return mlp(weights, rows, dot, keys)

    if capacity is not None:
        y = run_with_capacity(
            groups, run_mlp, x_GBTE, choice_GBTK, words, number=number, capacity=capacity
        )
        return groups.merge_groups(combine(y, share_GBTK))
    # A device's rows side by side: the dropless exchange does not need rows of the batch.
    G, B, T, K = choice_GBTK.shape
    x_GDTE = x_GBTE.reshape(G, groups.devices, B * T // groups.devices, -1)
    expert_GDR = choice_GBTK.reshape(G, groups.devices, -1)
    ragged = groups.is_fully_automatic and groups.platform in PLATFORMS
    run = run_dropless_ragged if ragged else run_dropless_padded
    y = run(groups, run_mlp, x_GDTE, expert_GDR, words, number=number)
    return groups.merge_groups(combine(y.reshape(G, B, T * K, -1), share_GBTK))


def _check_divisible(axis: str, devices: int, number: int) -> None:
    if number % devices:
        divisor = math.gcd(number, devices)
        why = f"{number} experts do not divide over {axis}={devices}"
        fix = f"{axis}={divisor}, or {-(-number // devices) * devices} experts"
        raise_all(StepError, "Experts cannot be split.", [Problem("sk.nn.experts", why, fix)])
