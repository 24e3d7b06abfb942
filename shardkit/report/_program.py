"""What a compiled step hands over to be inspected: plain data, so that nothing here imports it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from .._core.tree import Leaf, join_path, nbytes
from ._axis_kind import AxisKind
from .hlo._hlo import Module, dtype_bits, parse

PARTS = ("params", "opt_state", "model_state", "batch", "rest")


@dataclasses.dataclass(frozen=True)
class Placed:
    """One argument of the executable: an array, the spec it has, and whether it is donated.

    Attributes:
      part: which part of the step's input it belongs to: one of `PARTS`; the step counter and
        the random key are "rest".
      leaf: path, global shape and dtype.
      spec: its `PartitionSpec`, as resolved.
      donated: the caller gives the buffer away, so an output should reuse it.
      meant_whole: the declaration spells that every device holds all of it (`sk.REPLICATED`, or
        a parameter so declared that this leaf follows). Otherwise a copy on every device is a
        finding.
    """

    part: str
    leaf: Leaf
    spec: PartitionSpec
    donated: bool = False
    meant_whole: bool = False

    @property
    def name(self) -> str:
        """Its path with its part: `params/w`; of a bare array, `params`."""
        return join_path(self.part, self.leaf.path)

    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split this array.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> Placed("params", leaf, PartitionSpec(("data", "fsdp"), None)).axes()
        ('data', 'fsdp')
        """
        return tuple(axis for dim in self.spec for axis in _dim_axes(dim))

    def dims(self) -> tuple[tuple[str, ...], ...]:
        """Mesh axes that split each dim of the array, also where the spec is shorter."""
        dims = [*self.spec, *[None] * (len(self.leaf.shape) - len(self.spec))]
        return tuple(map(_dim_axes, dims))

    def shard(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one device's shard, where mesh axis `a` has `sizes[a]` devices."""
        ways = [math.prod(sizes[axis] for axis in dim) for dim in self.dims()]
        return tuple(-(-size // n) for size, n in zip(self.leaf.shape, ways, strict=True))

    def device_bytes(self, sizes: Mapping[str, int], dtype: str | None = None) -> int:
        """Bytes of one device's shard.

        Args:
          sizes: mesh axis → devices along it.
          dtype: XLA's name of a dtype to count as, `"bf16"`; None: the leaf's own.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> Placed("params", leaf, PartitionSpec("data")).device_bytes({"data": 4})
        32
        """
        if dtype is None:
            return nbytes(self.shard(sizes), self.leaf.dtype)
        return math.prod(self.shard(sizes)) * dtype_bits(dtype) // 8


def _dim_axes(dim: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a spec; `UNCONSTRAINED` counts as none."""
    if isinstance(dim, str):
        return (dim,)
    return dim if isinstance(dim, tuple) else ()


@dataclasses.dataclass(frozen=True)
class CompiledBytes:
    """What the compiler says one device needs, in bytes; None where it does not say.

    Attributes:
      argument: inputs.
      output: outputs.
      alias: outputs that reuse an input's buffer.
      temp: everything else that is alive at once.
      peak: the compiler's own peak, where it has one.
    """

    argument: int | None = None
    output: int | None = None
    alias: int | None = None
    temp: int | None = None
    peak: int | None = None

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
class Declared:
    """What the strategy declares, as far as it explains the compiled program.

    Attributes:
      kinds: the kinds of parallelism, each on its mesh axis. An axis that none is on is one the
        strategy says nothing about, and every collective over it becomes a finding. Empty: nothing
        is declared, nothing is judged.
      by_specs: kinds of further axes that the strategy does not name, as specs alone tell them;
        they have a minimum, and judge nothing.
      accumulate: micro-batches per step.
      compute_dtype: short name (`bf16`) of the dtype that activations and weights are sent in.
      reduce_dtype: short name of the dtype that gradients are reduced in.
      activation_bytes: bytes of one `[batch, length, embed]` activation on a device, before
        tensor parallelism splits it; with `layers` it gives the minimum of tensor parallelism.
      layers: number of transformer layers.
      choices: experts that each token chooses; with the two above it gives the minimum of expert
        parallelism.
      rules: messages about rules that matched nothing or are shadowed.
      constraints: what the model constrains, as the strategy lays it out: parts "activation",
        named as they are written, `constrain('batch', 'length', 'embed')`.
      activation_axes: mesh axes that the strategy splits activations over.
    """

    kinds: tuple[AxisKind, ...] = ()
    by_specs: tuple[AxisKind, ...] = ()
    accumulate: int = 1
    compute_dtype: str | None = None
    reduce_dtype: str | None = None
    activation_bytes: int | None = None
    layers: int | None = None
    choices: int | None = None
    rules: tuple[str, ...] = ()
    constraints: tuple[Placed, ...] = ()
    activation_axes: tuple[str, ...] = ()

    def kind_of(self, axis: str) -> AxisKind | None:
        """The kind of parallelism on a mesh axis; of several, the one that was joined last."""
        return next((kind for kind in reversed(self.kinds) if kind.axis == axis), None)

    def explains(self, axis: str) -> frozenset[str]:
        """Collectives that the kinds on a mesh axis account for."""
        return frozenset().union(*(kind.explains for kind in self.kinds if kind.axis == axis))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step and what was declared for it; the input of `Report`.

    Attributes:
      hlo: `compiled.as_text()`, the program of one device, scheduled.
      mesh: names and sizes of the mesh axes, in the order of the mesh.
      platform: `"cpu"`, `"tpu"`, `"gpu"`.
      device_kind: the device's own name (`"TPU v5p"`), which selects the memory capacity.
      leaves: every argument of the executable, in its order (compile with `keep_unused=True`).
      memory: what the compiler says about bytes.
      jaxpr: the closed jaxpr of the step, for FLOPs; None leaves them out.
      log: what the compiler printed to file descriptor 2 while it compiled.
      log_complete: the log was captured around a real compile; False after a hit in the
        persistent cache, where the compiler says nothing.
      compiles: how often the step was compiled so far.
      retraced: what changed in the batch each time that it was compiled again, with the leaf first.
      declared: what the strategy explains.
      dcn: mesh axes that cross slices, over the network between hosts, and how many slices lie
        along each.
      seconds: wall time of what was done to make it: `trace`, `lower`, `compile`.
    """

    hlo: str
    mesh: tuple[tuple[str, int], ...]
    platform: str
    device_kind: str = ""
    leaves: tuple[Placed, ...] = ()
    memory: CompiledBytes = CompiledBytes()
    jaxpr: Any = None
    log: str = ""
    log_complete: bool = True
    compiles: int = 1
    retraced: tuple[str, ...] = ()
    declared: Declared = dataclasses.field(default_factory=Declared)
    dcn: tuple[tuple[str, int], ...] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → number of devices along it."""
        return dict(self.mesh)

    def param_bytes(self, axis: str, dtype: str | None, *, split: bool) -> int:
        """Bytes of one device's shards of the parameters that an axis splits, or does not split.

        Args:
          axis: a mesh axis.
          dtype: XLA's name of a dtype to count them as; None: each in its own.
          split: which of the two.
        """
        sizes = self.sizes
        return sum(
            leaf.device_bytes(sizes, dtype)
            for leaf in self.leaves
            if leaf.part == "params" and (axis in leaf.axes()) == split
        )

    @property
    def layers(self) -> int | None:
        """Layers that one device works on; None where they are not known."""
        layers = self.declared.layers
        return None if layers is None else layers // self._stages

    @property
    def _stages(self) -> int:
        """Parts that the layers are cut into, of which a device works on one."""
        axes = {kind.axis for kind in self.declared.kinds if "layers" in kind.splits}
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def activation_bytes(self, name: str) -> float | None:
        """Bytes on one device, per step, of the activation that has a length and this dim."""
        for placed in self.declared.constraints:
            if {"length", name} <= set(placed.leaf.axes or ()):
                return placed.device_bytes(self.sizes) * self._times
        return None

    @property
    def _times(self) -> float:
        """How many activations as constraints show them a device computes in a step.

        Inside a pipeline they show one device's rows of one micro-batch.
        """
        work, declared = {"batch", "length", "embed"}, self.declared
        shown = [one for one in declared.constraints if set(one.leaf.axes or ()) == work]
        if self._stages == 1 or not shown or declared.activation_bytes is None:
            return declared.accumulate
        return declared.activation_bytes / shown[0].device_bytes(self.sizes)

    @functools.cached_property
    def module(self) -> Module:
        """The compiled program, parsed."""
        return parse(self.hlo)
