"""A compiled step and what was declared for it: the input of a report, as plain data.

`step` fills a `Program` in, so that nothing here imports it.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from jax.extend.core import ClosedJaxpr

from .._core.tree import path_ends
from ._placed_leaf import PlacedLeaf
from ._saved import TickTable
from .communication._ends import add_ends
from .communication._entries import weights_of_products
from .communication._governing import GoverningConstraint, OddDeclaration, SplitDim
from .communication._ledger import Ledger, LedgerRow, build_ledger
from .hlo._hlo import Module, parse

SplitPart = Literal["rows", "length", "layers", "experts", "weights", "heads", "optimizer_state"]


@dataclasses.dataclass(frozen=True)
class CompiledBytes:
    """What the compiler says one device needs, in bytes; None where it does not say."""

    argument: int | None = None  # inputs
    output: int | None = None  # outputs
    alias: int | None = None  # outputs that reuse an input's buffer
    temp: int | None = None  # everything else that is alive at once
    peak: int | None = None  # the compiler's own peak, where it has one

    @classmethod
    def of(cls, stats: Any) -> "CompiledBytes":
        """Reads `compiled.memory_analysis()`, which some backends leave out (None)."""
        if stats is None:
            return cls()
        return cls(
            argument=stats.argument_size_in_bytes,
            output=stats.output_size_in_bytes,
            alias=stats.alias_size_in_bytes,
            temp=stats.temp_size_in_bytes,
            peak=stats.peak_memory_in_bytes or None,
        )


@dataclasses.dataclass(frozen=True)
class AxisKind(abc.ABC):
    """The kind of parallelism on one mesh axis, as far as a report judges it."""

    axis: str  # the mesh axis
    name: ClassVar[str]  # of the kind, without its variant: `"tensor"`
    # what is divided over the axis. "weights" are stored in shards and gathered where they are
    # used; "heads" means every dim whose products are computed in shards.
    splits: ClassVar[frozenset[SplitPart]] = frozenset()
    # collectives (`"all-reduce"`, …) that it sends over its axis, including the all-reduces of
    # losses and norms
    collectives: ClassVar[frozenset[str]] = frozenset()

    @property
    def explains(self) -> frozenset[str]:
        """Collectives over the axis that are not findings."""
        return self.collectives

    @property
    def gathered_activations(self) -> frozenset[str]:
        """Logical axes of activations that are stored in shards and gathered for each use."""
        return frozenset()

    @property
    def activation_fix(self) -> str:
        """Code that splits the activations that it leaves replicated; empty if there is none."""
        return ""

    @abc.abstractmethod
    def minimum(self, program: "Program") -> float | None:
        """The textbook minimum: the fewest bytes one device must send over the axis per step.

        Args:
          program: its parameters, their layout, and the other declarations; not its collectives.

        Returns:
          Bytes; None if the program does not determine them.
        """

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: "Program"
    ) -> Iterator[tuple[str, float]]:
        """Explains which part of a collective exceeds the minimum.

        Args:
          row: a collective over the axis, outside of recomputation.
          rows: all collectives over the axis.
          program: what is declared.

        Yields:
          (reason, share of the row's bytes); the shares of a row add up to at most 1.
        """
        del row, rows, program
        yield from ()


@dataclasses.dataclass(frozen=True)
class Declarations:
    """What the strategy declares, as far as it explains the compiled program."""

    # the kinds of parallelism, each on its mesh axis. On an axis without a kind every collective
    # becomes a finding. Empty: nothing is declared, and no collective is judged.
    kinds: tuple[AxisKind, ...] = ()
    # kinds of other axes, derived from specs; they have a minimum, and judge nothing
    by_specs: tuple[AxisKind, ...] = ()
    accumulate: int = 1  # micro-batches per step
    reduce_at_end: bool = False  # gradients are reduced once, after the last micro-batch
    # short name (`bf16`) of the dtype that activations and weights are sent in
    compute_dtype: str | None = None
    reduce_dtype: str | None = None  # short name of the dtype that gradients are reduced in
    # bytes of one `[batch, length, embed]` activation on a device, before tensor parallelism splits
    # it; with `layers` it gives the minimum of tensor parallelism
    activation_bytes: int | None = None
    layers: int | None = None  # number of transformer layers
    # experts per token (top k); with these two also that of expert parallelism
    choices: int | None = None
    # blocks of keys and values that a ring sends to a device; None without one
    ring_blocks: int | None = None
    rules: tuple[str, ...] = ()  # messages about rules that matched nothing or are shadowed
    # activations that the model constrains, with the strategy's specs: part "activation", named as
    # written, `constrain('batch', 'length', 'embed')`
    constraints: tuple[PlacedLeaf, ...] = ()
    activation_axes: tuple[str, ...] = ()  # mesh axes that the strategy splits activations over
    row_axes: tuple[str, ...] = ()  # mesh axes that split the dims of the batch that count rows
    # `(mesh axis, bytes)`: the fewest that one device sends over the axis to move matrices that the
    # optimizer multiplies to their owners and back
    owned: tuple[tuple[str, float], ...] = ()
    # the optimizer multiplies matrices that `StepSpec(owners=True)` might divide
    undivided: bool = False
    # the constraints of the traced step, with the lines whose layout they decide
    governing: tuple[GoverningConstraint, ...] = ()
    odd: tuple[OddDeclaration, ...] = ()  # declarations that all others disagree with
    split_dims: tuple[SplitDim, ...] = ()  # dims that operations take together or need whole
    # options that change nothing: why, and what to change
    idle_options: tuple[tuple[str, str], ...] = ()

    def kind_of(self, axis: str) -> AxisKind | None:
        """The kind of parallelism on a mesh axis; of several, the last one of the strategy."""
        return next((kind for kind in reversed(self.kinds) if kind.axis == axis), None)

    def explains(self, axis: str) -> frozenset[str]:
        """Collectives that the kinds on a mesh axis explain."""
        return frozenset().union(*(kind.explains for kind in self.kinds if kind.axis == axis))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step and what was declared for it; the input of `Report`."""

    hlo: str  # `compiled.as_text()`, the program of one device, scheduled
    mesh: tuple[tuple[str, int], ...]  # names and sizes of the mesh axes, in the order of the mesh
    platform: str  # `"cpu"`, `"tpu"`, `"gpu"`
    device_kind: str = ""  # the device's own name (`"TPU v5p"`), which selects the memory capacity
    # every argument of the executable, in its order (compile with `keep_unused=True`)
    leaves: tuple[PlacedLeaf, ...] = ()
    memory: CompiledBytes = CompiledBytes()  # what the compiler says about bytes
    # the closed jaxpr of the step, for FLOPs; None leaves them out
    jaxpr: ClosedJaxpr | None = None
    log: str = ""  # what the compiler printed to file descriptor 2 while it compiled
    # the log was captured around a real compile; False after a hit in the persistent cache, which
    # prints no messages
    log_complete: bool = True
    compiles: int = 1  # how often the step was compiled so far
    retraced: tuple[str, ...] = ()  # per recompile, what changed in the batch, the leaf first
    # what the strategy explains
    declared: Declarations = dataclasses.field(default_factory=Declarations)
    # mesh axes that cross slices, over the network between hosts, with the number of slices along
    # each
    dcn: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()  # what the step takes otherwise than it was written, as text
    ticks: tuple[TickTable, ...] = ()  # the schedules of its pipelines
    # wall time of `trace`, `lower` and `compile`
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → number of devices along it."""
        return dict(self.mesh)

    def param_bytes(
        self,
        axis: str,
        dtype: str | None,
        *,
        split: bool,
        trained: bool = False,
        backward: bool = False,
    ) -> int:
        """Bytes of one device's shards of the parameters that an axis splits, or does not split.

        Floats count as XLA's name of a dtype; None: each in its own. `trained` leaves out frozen
        parameters, which have no gradients; `backward` those that the backward pass does not need.
        """
        return sum(
            leaf.device_bytes(self.sizes, dtype)
            for leaf in self.leaves
            if leaf.part == "params" and (axis in leaf.axes()) == split
            if not (trained and leaf.frozen) and not (backward and leaf.forward_only)
        )

    @property
    def layers(self) -> int | None:
        """Layers per pipeline stage; None if unknown."""
        layers = self.declared.layers
        return None if layers is None else layers // self._stages

    @property
    def _stages(self) -> int:
        """Pipeline stages."""
        axes = {kind.axis for kind in self.declared.kinds if "layers" in kind.splits}
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def activation_bytes(self, name: str) -> float | None:
        """Bytes per device and step of the constrained activation with a length and this axis."""
        for placed in self.declared.constraints:
            if {"length", name} <= set(placed.leaf.axes or ()):
                return placed.device_bytes(self.sizes) * self._activations_per_step
        return None

    @property
    def _activations_per_step(self) -> float:
        """How often per step a device computes an activation of the shape in a constraint.

        Inside a pipeline that shape holds one device's rows of one micro-batch.
        """
        work, declared = {"batch", "length", "embed"}, self.declared
        shown = [leaf for leaf in declared.constraints if set(leaf.leaf.axes or ()) == work]
        if self._stages == 1 or not shown or declared.activation_bytes is None:
            return declared.accumulate
        return declared.activation_bytes / shown[0].device_bytes(self.sizes)

    @property
    def fits_shard_map(self) -> bool:
        """Whether `mode="shard_map"` knows what each axis that splits parameters is for."""
        known = self.batch_axes | {kind.axis for kind in self.declared.kinds}
        return all(known.issuperset(leaf.axes()) for leaf in self.leaves if leaf.part == "params")

    def own_layouts(self, axes: Collection[str]) -> dict[PlacedLeaf, PlacedLeaf]:
        """Optimizer state that a rule of its own lays out unlike its parameter, over some axes.

        Each with its parameter.
        """
        return {
            leaf: own
            for leaf, own in self.moments.items()
            if leaf.dims() != own.dims() and {*axes} & {*leaf.axes(), *own.axes()}
        }

    @functools.cached_property
    def moments(self) -> dict[PlacedLeaf, PlacedLeaf]:
        """Leaves of the optimizer state → the parameter of their shape that they belong to."""
        params = {
            (leaf.leaf.path, leaf.leaf.shape): leaf for leaf in self.leaves if leaf.part == "params"
        }
        owners = {
            leaf: [params.get((end, leaf.leaf.shape)) for end in path_ends(leaf.leaf.path)]
            for leaf in self.leaves
            if leaf.part == "opt_state"
        }
        first = {leaf: next(filter(None, found), None) for leaf, found in owners.items()}
        return {leaf: own for leaf, own in first.items() if own is not None}

    @functools.cached_property
    def weights(self) -> dict[tuple[str, int], list[PlacedLeaf]]:
        """The parameters that the products of each line multiply with, by file and line."""
        return weights_of_products(self)

    @functools.cached_property
    def module(self) -> Module:
        """The compiled program, parsed."""
        return parse(self.hlo)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Every collective of the compiled program."""
        return add_ends(build_ledger(self.module, self.hlo, self.mesh, self.dcn), self)

    @property
    def batch_axes(self) -> set[str]:
        """Mesh axes that split the rows of the batch; see `find_batch_axes`."""
        return find_batch_axes(self.leaves, self.declared.kinds, self.declared.row_axes)


def find_batch_axes(
    leaves: Iterable[PlacedLeaf], kinds: Iterable[AxisKind], row_axes: Collection[str]
) -> set[str]:
    """Mesh axes that split rows of the batch, or the length that all its leaves have.

    Labels that alone are split by features are split over no axis of rows. Where rows of two leaves
    are split over different axes, those count that split no parameter, then those of most leaves.
    """
    placed = list(leaves)
    of_params = {axis for leaf in placed if leaf.part == "params" for axis in leaf.axes()}
    dims = [leaf.dims() for leaf in placed if leaf.part == "batch"]
    rows = [set(leaf[0]) for leaf in dims if leaf and leaf[0]]
    named = set().union(*rows)

    def rank(axis: str) -> tuple[bool, int]:
        return axis in of_params, -sum(axis in of for of in rows)

    beside = {axis: set().union(*(of for of in rows if axis in of)) for axis in named}
    doubted = {axis for axis in named if any(of.isdisjoint(beside[axis]) for of in rows)}
    first = named - {axis for axis in doubted if rank(axis) > min(map(rank, doubted))}
    others = [{axis for dim in leaf[1:] for axis in dim} for leaf in dims if len(leaf) > 1]
    known = {kind.axis for kind in kinds if {"rows", "length"} & kind.splits} | {*row_axes}
    of_all = set.intersection(*others) if others else set()
    return first | of_all | (set().union(*others) & known)
