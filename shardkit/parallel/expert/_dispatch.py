"""Groups of devices that exchange tokens, and where their arrays are while they do.

Dims: G groups, whose tokens never meet; D devices of a group, along the axis of the experts.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from ...nn._overridable import StepContext, current_mesh, is_partly_manual, manual_axes

Mlp = Callable[..., jax.Array]
RunMlp = Callable[[jax.Array, Callable[..., jax.Array], jax.Array | None], jax.Array]
"""`(rows, dot, keys of the rows or None) → rows`: the model's MLP with its weights."""


@dataclasses.dataclass(frozen=True)
class ExpertGroups:
    """The devices along one mesh axis form a group; the other axes that split rows number them."""

    around: StepContext  # the step; which axes split the rows, and in what order
    axis: str  # the axis that tokens are sent over

    @property
    def devices(self) -> int:
        """Devices along the axis."""
        return self.around.mesh.shape[self.axis]

    @property
    def platform(self) -> str:
        """Platform of the mesh's devices."""
        return self.around.mesh.devices.flat[0].platform

    @property
    def is_fully_automatic(self) -> bool:
        """Whether no enclosing `shard_map` makes axes manual."""
        return not manual_axes()

    def split_groups(self, x: jax.Array) -> jax.Array:
        """[rows, ...] → [G, rows of a group, ...], without a row leaving its device.

        With rows over (data=2, expert=2), 8 rows are on devices as 01 23 | 45 67. A group is one
        place along data: dims (data, expert, 2) → (data, expert · 2).
        """
        sizes, position = self._row_sizes()
        split = x.reshape(*sizes, x.shape[0] // math.prod(sizes), *x.shape[1:])
        moved = jnp.moveaxis(split, position, len(sizes) - 1)
        groups = math.prod(sizes) // sizes[position]
        rows = moved.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        return self._constrain(rows, self.axis, *self._unsplit)

    def merge_groups(self, x: jax.Array) -> jax.Array:
        """The inverse of `split_groups`."""
        sizes, position = self._row_sizes()
        moved = [size for number, size in enumerate(sizes) if number != position]
        rows = x.shape[0] * x.shape[1]
        x = self._constrain(x, self.axis, *self._unsplit)
        split = x.reshape(*moved, sizes[position], rows // math.prod(sizes), *x.shape[2:])
        return jnp.moveaxis(split, len(sizes) - 1, position).reshape(rows, *x.shape[2:])

    def to_experts(self, x: jax.Array) -> jax.Array:
        """Sends [G, sender, receiver, ...] from its senders to its receivers: one all-to-all.

        The result has a name for remat policies.
        """
        sent = self._constrain(x, self.axis, None)
        return checkpoint_name(self._constrain(sent, None, self.axis), "experts_in")

    def from_experts(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_experts`."""
        sent = self._constrain(x, None, self.axis)
        return checkpoint_name(self._constrain(sent, self.axis, None), "experts_out")

    def gather(self, x: jax.Array) -> jax.Array:
        """[G, D, ...] with all of a group's on each of its devices."""
        return self._constrain(self._constrain(x, self.axis), None)

    def run_per_device(self, run: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """Runs a function of arrays [G or 1, D, ...] on the devices that hold each group's part.

        Gradient shards count as groups. Inside one, before `vmap` adds their dim, the function runs
        on all of the arrays.
        """
        return self._run(run, args, {*self._group_axes, self.axis})

    def run_manual(self, run: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """As `run_per_device` with every axis manual; devices along the others repeat the work."""
        return self._run(run, args, set(self.around.mesh.axis_names))

    @property
    def _group_axes(self) -> tuple[str, ...]:
        """Axes that number the groups, those of gradient shards among them."""
        manual = manual_axes()
        return tuple(a for a in self.around.row_axes if a != self.axis and a not in manual)

    def _run(
        self, run: Callable[..., jax.Array], args: Sequence[jax.Array], axes: set[str]
    ) -> jax.Array:
        group_axes, mesh = self._group_axes, current_mesh(self.around.mesh)
        if args[0].shape[0] % math.prod(mesh.shape[axis] for axis in group_axes):
            return run(*args)
        specs = [PartitionSpec(group_axes if x.shape[0] > 1 else None, self.axis) for x in args]
        mapped = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            axis_names=axes,
            # Over further axes, which no spec names, all devices have the same.
            check_vma=axes == {*group_axes, self.axis},
        )
        return mapped(*args)

    @property
    def _unsplit(self) -> tuple[None, ...]:
        """Inside a stage of a pipeline, rows and length are whole.

        There XLA aborts on a gather along a split dim if another axis splits a dim beside it.
        """
        return (None, None) if is_partly_manual() else ()

    def _row_sizes(self) -> tuple[list[int], int]:
        """Devices along each axis that splits rows, and the position of `axis` among them."""
        rows = self.around.free_row_axes
        axes = rows if self.axis in rows else (*rows, self.axis)
        return [self.around.mesh.shape[axis] for axis in axes], axes.index(self.axis)

    def _constrain(self, x: jax.Array, *split: str | None) -> jax.Array:
        """Splits groups over their axes and the next dims as given; the rest is unconstrained."""
        groups = tuple(axis for axis in self.around.free_row_axes if axis != self.axis) or None
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1 - len(split))
        spec = PartitionSpec(groups, *split, *others)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(current_mesh(self.around.mesh), spec)
        )
