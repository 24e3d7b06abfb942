"""What a compiled step hands over to be inspected: plain data, so that nothing here imports it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from shardkit._tree import Leaf, nbytes

PARTS = ("params", "opt_state", "extra", "batch", "rest")


@dataclasses.dataclass(frozen=True)
class Placed:
    """One argument of the executable: an array, the spec it has, and whether it is donated.

    Attributes:
      part: which part of the step's input it belongs to: one of `PARTS`; the step counter and
        the random key are "rest".
      leaf: path, global shape and dtype.
      spec: its `PartitionSpec`, as resolved.
      donated: the caller gives the buffer away, so an output should reuse it.
    """

    part: str
    leaf: Leaf
    spec: PartitionSpec
    donated: bool = False

    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split this array.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> Placed("params", leaf, PartitionSpec(("data", "fsdp"), None)).axes()
        ('data', 'fsdp')
        """
        return tuple(axis for dim in self.spec for axis in _dim_axes(dim))

    def device_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of one device's shard, where mesh axis `a` has `sizes[a]` devices.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> Placed("params", leaf, PartitionSpec("data")).device_bytes({"data": 4})
        32
        """
        dims = [*self.spec, *[None] * (len(self.leaf.shape) - len(self.spec))]
        shard = []
        for size, dim in zip(self.leaf.shape, dims, strict=True):
            parts = 1
            for axis in _dim_axes(dim):
                parts *= sizes[axis]
            shard.append(-(-size // parts))
        return nbytes(tuple(shard), self.leaf.dtype)


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
      explains: mesh axis → kinds of collectives (`"all-reduce"`, …) that the strategy accounts
        for on that axis. An axis that is missing is one the strategy says nothing about, and
        every collective over it becomes a finding. None: nothing is declared, nothing is judged.
      kinds: mesh axis → the kind of parallelism on it (`"data"`, `"fsdp"`, `"zero"`, `"tensor"`
        …), which selects the textbook minimum.
      accumulate: micro-batches per step.
      compute_dtype: short name (`bf16`) of the dtype that activations and weights are sent in.
      reduce_dtype: short name of the dtype that gradients are reduced in.
      whole_params: the strategy means weights to be gathered (fsdp), so gathers of a whole
        parameter are expected on these axes.
      rules: messages about rules that matched nothing or are shadowed, as `explain` words them.
    """

    explains: Mapping[str, frozenset[str]] | None = None
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    compute_dtype: str | None = None
    reduce_dtype: str | None = None
    whole_params: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()


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
      declared: what the strategy explains.
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
    declared: Declared = dataclasses.field(default_factory=Declared)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → number of devices along it."""
        return dict(self.mesh)
