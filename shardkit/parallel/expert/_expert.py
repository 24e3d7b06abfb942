"""Expert parallelism: experts split over a mesh axis, tokens travel to them and back.

`x[B_expert, T, D] → h[X_expert, C, D] · W[X_expert, D, F] → y[X_expert, C, D] → z[B_expert, T, D]`

Collectives per layer, n devices, R bytes of routed tokens on one device (k choices of each token,
or the slots of all experts): two all-to-alls forward and two backward, 4(n−1)/n · R per device.
Dropless on n devices, every device gets n times the room, because all tokens may want one
device; a padded exchange sends all of it, n · R. The rest of the model sees `expert` as one more
axis of data parallelism; gradients of experts are never reduced over it.

What is used where: bounded by capacity the exchange is an all-to-all of equal parts. Dropless it is
`jax.lax.ragged_all_to_all` on TPUs and GPUs, (n−1)/n · R when balanced; XLA's CPU backend lacks it,
and a stage of a pipeline is manual over its own axis only: there it is padded to the room. The
dropless products of a place are `jax.lax.ragged_dot` everywhere.

Drops are counted per row of the batch, neither per device nor over the mesh: where routers choose
alike, one device and every mesh drop the same tokens. With a capacity, runs on two meshes drift
apart once rounding that grew over updates turns one router's tie, as the token that moves may push
later ones of its row out of their slots. `benchmarks/results/expert_tie.md` lists the tokens where
that first happens, and that one device makes the mesh's loss of the mesh's weights.

Use when a mixture's experts do not fit, and each holds enough tokens to keep a device busy. Do
not use across slow links, where every layer waits four times for every token.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from ..._core.errors import Problem, StepError, raise_all
from ...nn._expert_dispatch import collect, combine, dispatch, even, in_order, ragged, slots
from ...nn._overridable import Override, StepContext, manual_axes, mesh_here, partly_manual
from ...report import Program
from .._kind import Kind
from .._names import activations, check_axis, params
from .._strategy import Strategy
from ._ragged import PLATFORMS, arrived, exchange, way_of

Plain = Callable[..., jax.Array]
Mlp = Callable[..., jax.Array]


def expert_bytes(n: int, routed: float, layers: int) -> float:
    """Two all-to-alls of the routed tokens forward and two backward, per expert layer.

    >>> expert_bytes(4, 1000, 1)
    3000.0
    """
    return 4 * (n - 1) / n * routed * layers


def expert(axis: str = "expert") -> Strategy:
    """Splits experts, and the rows of the batch, over a mesh axis.

    Args:
      axis: name of the mesh axis.

    Returns:
      A strategy for models whose parameters name an `experts` dim, and which compute with them
      by `sk.nn.experts`. Joined with others it should come last, so that the rows of one lane lie
      side by side.

    >>> expert().params.spec(("layers", "experts", "embed", "expert_mlp"))
    P(None, 'expert')
    """
    check_axis("expert", axis)
    return Strategy(
        params=params({"experts": axis}),
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(Expert(axis),),
        overrides=(("experts", AllToAll(axis)),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Expert(Kind):
    """Experts and rows over an axis."""

    name: ClassVar[str] = "expert"
    splits = frozenset({"rows", "experts"})
    collectives = frozenset({"all-reduce", "all-to-all", "ragged-all-to-all"})
    override = "experts"
    weighed = "bounded experts"
    not_weighed = ("dropless experts",)
    make = staticmethod(expert)

    def shares_axis(self, other: Kind) -> bool:
        """Experts may live where rows are split: routed tokens change devices there."""
        return "rows" in other.splits and "experts" not in other.splits

    def minimum(self, program: Program) -> float | None:
        """Lepikhin et al. 2020; and gradients of what is no expert, reduced as for `data`."""
        activation, choices = program.declared.activation_bytes, program.declared.choices
        if activation is None or choices is None or program.layers is None:
            return None
        n = program.sizes[self.axis]
        routed = expert_bytes(n, activation * choices, program.layers)
        return self.reduced_bytes(program) + routed


@dataclasses.dataclass(frozen=True)
class AllToAll(Override):
    """Carries out `sk.nn.experts`: every device sends tokens to the devices that hold their experts.

    What moves is stated by two constraints, split by sender before and by receiver behind, which
    the partitioner meets by an all-to-all. A `shard_map` over this axis alone would not do: XLA
    gathers the operand of its all-to-all over every axis that is left to the partitioner.
    """

    @property
    def moves_rows(self) -> bool:
        """Tokens leave their device."""
        return True

    def __call__(self, around: StepContext, plain: Plain, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns what `plain(x, choice, share, weights, mlp, capacity)` would.

        Raises:
          StepError: the axis does not divide the number of experts.
        """
        return _carry(_Groups(around, self.axis), *args, **kwargs)


def _carry(
    groups: "_Groups",
    x_BTE: jax.Array,
    choice_BTK: jax.Array,
    share_BTK: jax.Array,
    weights: Any,
    mlp: Mlp,
    capacity: int | None,
) -> jax.Array:
    number = jax.tree.leaves(weights)[0].shape[0]
    _check(groups.axis, groups.devices, number)
    x, choice, share = (groups.apart(a) for a in (x_BTE, choice_BTK, share_BTK))
    if capacity is None:
        y = _dropless(groups, mlp, weights, number, x, choice, share)
    else:
        y = _bounded(groups, mlp, weights, number, capacity, x, choice, share)
    return groups.together(y)


def _bounded(
    groups: "_Groups",
    mlp: Mlp,
    weights: Any,
    number: int,
    capacity: int,
    x_GBTE: jax.Array,
    choice_GBTK: jax.Array,
    share_GBTK: jax.Array,
) -> jax.Array:
    """Every row sends the slots of its experts, full or not."""
    count, rows, length, chosen = choice_GBTK.shape
    slot, row = slots(choice_GBTK.reshape(count, rows, length * chosen), number, capacity)
    h = dispatch(x_GBTE, row, slot, chosen).reshape(count, rows, number, capacity, -1)
    y = groups.back(mlp(weights, groups.forth(h), even))
    y = y.reshape(count, rows, number * capacity, -1)
    return combine(collect(y, row, slot), share_GBTK)


def _dropless(
    groups: "_Groups",
    mlp: Mlp,
    weights: Any,
    number: int,
    x_GBTE: jax.Array,
    choice_GBTK: jax.Array,
    share_GBTK: jax.Array,
) -> jax.Array:
    """Every device has room for all tokens of every other one, and sorts what came by expert.

    Dims: D devices that send or receive, R rows (choices of tokens) of one of them.
    """
    count, rows, length, chosen = choice_GBTK.shape
    x = x_GBTE.reshape(count, groups.devices, rows * length // groups.devices, -1)
    wanted = choice_GBTK.reshape(count, groups.devices, -1)
    through = _unpadded if groups.takes_ragged else _padded
    y = through(groups, mlp, weights, number, x, wanted)
    return combine(y.reshape(count, rows, length * chosen, -1), share_GBTK)


def _unpadded(
    groups: "_Groups",
    mlp: Mlp,
    weights: Any,
    number: int,
    x_GDTE: jax.Array,
    wanted_GDR: jax.Array,
) -> jax.Array:
    """[G, D, R, E]: what experts make of the rows, which alone travel."""
    rows = wanted_GDR.shape[-1]
    own, room = number // groups.devices, groups.devices * rows
    order, at, wanted = in_order(wanted_GDR, number)
    wanted = groups.everywhere(wanted)
    way = way_of(wanted)
    h = dispatch(x_GDTE, order, at, rows // x_GDTE.shape[2])
    h = checkpoint_name(exchange(groups.on_all, groups.axis, room, h, way), "experts_in")
    again, back, sizes = in_order(arrived(wanted, room), own)
    h = dispatch(h, again, back, 1)
    y = collect(mlp(weights, h, lambda a, w: ragged(a, w, sizes, groups.spread)), again, back)
    y = exchange(groups.on_all, groups.axis, rows, y, way.back)
    return collect(checkpoint_name(y, "experts_out"), order, at)


def _padded(
    groups: "_Groups",
    mlp: Mlp,
    weights: Any,
    number: int,
    x_GDTE: jax.Array,
    wanted_GDR: jax.Array,
) -> jax.Array:
    """[G, D, R, E]: the same through slots that every device keeps for every other one."""
    count, devices, room = wanted_GDR.shape
    own, chosen = number // devices, room // x_GDTE.shape[2]
    x, wanted = x_GDTE, wanted_GDR
    slot, row = slots(wanted // own, devices, room)
    h = dispatch(x, row, slot, chosen).reshape(count, devices, devices, room, -1)
    # An empty slot belongs to no expert: `own` is one past the last.
    which = jnp.take_along_axis(wanted % own, row, -1, mode="fill", fill_value=own)
    h, which = groups.forth(h), groups.forth(which.reshape(count, devices, devices, room))
    h, which = h.swapaxes(1, 2), which.swapaxes(1, 2).reshape(count, devices, -1)
    order, at, sizes = in_order(which, own)
    h = dispatch(h.reshape(count, devices, devices * room, -1), order, at, 1)
    y = collect(mlp(weights, h, lambda a, w: ragged(a, w, sizes, groups.spread)), order, at)
    y = groups.back(y.reshape(count, devices, devices, room, -1).swapaxes(1, 2))
    return collect(y.reshape(count, devices, devices * room, -1), row, slot)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The devices along one axis work together; every other place in the mesh is a group.

    Attributes:
      around: which axes split the rows, and in what order.
      axis: the one that tokens travel over.
    """

    around: StepContext
    axis: str

    @property
    def _rows(self) -> tuple[str, ...]:
        """Axes that split the rows; tokens of one lane stay in it."""
        return self.around.free_rows

    @property
    def devices(self) -> int:
        """Devices along the axis."""
        return self.around.mesh.shape[self.axis]

    def apart(self, x: jax.Array) -> jax.Array:
        """[rows, ...] → [groups, rows of a group, ...], without a row leaving its device."""
        sizes, at = self._sizes()
        split = x.reshape(*sizes, x.shape[0] // math.prod(sizes), *x.shape[1:])
        moved = jnp.moveaxis(split, at, len(sizes) - 1)
        groups = math.prod(sizes) // sizes[at]
        rows = moved.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        return self._placed(rows, self.axis, *self._whole)

    def together(self, x: jax.Array) -> jax.Array:
        """The inverse of `apart`."""
        sizes, at = self._sizes()
        moved = [size for number, size in enumerate(sizes) if number != at] + [sizes[at]]
        rows = x.shape[0] * x.shape[1]
        placed = self._placed(x, self.axis, *self._whole)
        split = placed.reshape(*moved, rows // math.prod(sizes), *x.shape[2:])
        return jnp.moveaxis(split, len(sizes) - 1, at).reshape(rows, *x.shape[2:])

    def forth(self, x: jax.Array) -> jax.Array:
        """Split by sender, dim 1, to split by receiver, dim 2, under a name for remat policies."""
        sent = self._placed(x, self.axis, None)
        return checkpoint_name(self._placed(sent, None, self.axis), "experts_in")

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse of `forth`."""
        sent = self._placed(x, None, self.axis)
        return checkpoint_name(self._placed(sent, self.axis, None), "experts_out")

    def everywhere(self, x: jax.Array) -> jax.Array:
        """[groups, devices, ...], all of a group's on each of its devices."""
        return self._placed(self._placed(x, self.axis), None)

    @property
    def takes_ragged(self) -> bool:
        """Whether rows are exchanged unpadded, which compilers do where every axis is manual."""
        return self.around.mesh.devices.flat[0].platform in PLATFORMS and not manual_axes()

    def spread(self, one: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """Computes `one` of arrays [groups or 1, devices, ...] where each group and device is.

        Lanes count as groups. Inside of one, while the lanes are not yet seen, all is one place.
        """
        return self._spread(one, args, {*self._others, self.axis})

    def on_all(self, one: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """The same with no axis left to the partitioner; devices along others repeat the work."""
        return self._spread(one, args, set(self.around.mesh.axis_names))

    @property
    def _others(self) -> tuple[str, ...]:
        """Axes of the groups, those of lanes among them."""
        manual = manual_axes()
        return tuple(a for a in self.around.rows if a != self.axis and a not in manual)

    def _spread(
        self, one: Callable[..., jax.Array], args: Sequence[jax.Array], axes: set[str]
    ) -> jax.Array:
        others, mesh = self._others, mesh_here(self.around.mesh)
        if args[0].shape[0] % math.prod(mesh.shape[axis] for axis in others):
            return one(*args)
        specs = [PartitionSpec(others if x.shape[0] > 1 else None, self.axis) for x in args]
        place = jax.shard_map(
            one,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            axis_names=axes,
            check_vma=axes == {*others, self.axis},  # over further axes all have the same
        )
        return place(*args)

    @property
    def _whole(self) -> tuple[None, ...]:
        """Rows and length, which is whole inside a stage of a pipeline.

        There XLA aborts on a gather along a split dim if another axis splits a dim beside it.
        """
        return (None, None) if partly_manual() else ()

    def _sizes(self) -> tuple[list[int], int]:
        """Devices along each axis of the rows, and which of them tokens travel over."""
        axes = self._rows if self.axis in self._rows else (*self._rows, self.axis)
        return [self.around.mesh.shape[axis] for axis in axes], axes.index(self.axis)

    def _placed(self, x: jax.Array, *split: str | None) -> jax.Array:
        """Groups over the other axes, the next dims as given, the rest as the compiler likes."""
        others = tuple(axis for axis in self._rows if axis != self.axis) or None
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1 - len(split))
        spec = PartitionSpec(others, *split, *rest)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh_here(self.around.mesh), spec))


def _check(axis: str, devices: int, number: int) -> None:
    if number % devices:
        near = math.gcd(number, devices)
        why = f"{number} experts do not divide over {axis}={devices}"
        fix = f"{axis}={near}, or {-(-number // devices) * devices} experts"
        raise_all(StepError, "Experts cannot be split.", [Problem("sk.nn.experts", why, fix)])
