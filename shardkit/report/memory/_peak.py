"""Which buffers are alive when a step's memory peaks, by class and by scope.

The compiler reports one figure for all its allocations; its schedule tells what they are. The
split by class is called rough unless its sum agrees with the compiler's figure.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from ..._core.source import Source
from ..._core.tree import format_bytes
from .._program import Program
from ..hlo._scope import phase_of, scope_of
from ..hlo._source_lines import Sources
from ._history import MemoryHistory, alive_bytes, build_history
from ._liveness import Buffer, Liveness
from ._memory import Memory

CLASSES = ("gradients", "activations", "weights", "collectives", "outputs", "temporaries")
_CLOSE = 0.1
_LARGEST = 24
_BACKWARD = frozenset({"backward", "recompute"})


@dataclasses.dataclass(frozen=True)
class LiveBuffer:
    """A buffer that is alive at the peak."""

    kind: str  # one of `CLASSES`
    shape: str  # type of the array on one device: `f32[4,16]`
    bytes: int  # bytes in the device's memory, with the padding of its layout
    scope: str  # the model's scope that computes it
    phase: str  # parts of the step that write it: `forward, backward`
    name: str  # name of the HLO instruction
    op_name: str  # JAX's path for it
    source: Source | None = None  # the line of the user's code that computes it; None if unknown


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a step at which the most bytes are alive, without its arguments.

    Computed from the schedule; `compiler_bytes` is the compiler's own figure for the same. The
    class of a buffer follows from what writes and reads it:

    * gradients: written backward, in the shape of a parameter's shard or read by the update;
    * activations: written forward, read backward;
    * weights: computed from parameters alone: gathered, cast or copied;
    * collectives: results of other collectives;
    * outputs: results of the step that reuse no input;
    * temporaries: all others.
    """

    bytes: int  # alive at that moment, without the arguments of the step
    # the compiler's figure, without the arguments; None if it reports none
    compiler_bytes: int | None
    phase: str  # phase of the step at that moment
    scope: str  # the model's scope at that moment
    classes: Mapping[str, int]  # class → bytes; adds up to `bytes`
    scopes: Mapping[str, int]  # scope → bytes, the most first; adds up to `bytes`
    largest: tuple[LiveBuffer, ...]  # the largest buffers, the largest first
    problems: tuple[str, ...] = ()  # what could not be followed; with any, `bytes` is a lower bound
    moment: int = 0  # number of that moment in the schedule
    history: MemoryHistory | None = None  # what is alive over the whole step

    @property
    def coverage(self) -> float | None:
        """`bytes` ÷ `compiler_bytes`; None if the compiler reports no figure."""
        return self.bytes / self.compiler_bytes if self.compiler_bytes else None

    @property
    def agrees(self) -> bool:
        """Schedule and compiler agree within 10 %, so that the split by class can be trusted."""
        off = None if self.coverage is None else abs(self.coverage - 1)
        return off is not None and off <= _CLOSE and not self.problems

    def __str__(self) -> str:
        """Returns the moment, bytes per class, and the agreement with the compiler."""
        mark = "" if self.agrees else "~"
        parts = [f"{name} {mark}{format_bytes(n)}" for name, n in self.classes.items() if n]
        where = f"{self.phase}{', ' if self.scope else ''}{self.scope}"
        text = f"Besides the arguments, at the peak ({where}): {'; '.join(parts) or 'nothing'}"
        return f"{text}. {self._agreement()}"

    def _agreement(self) -> str:
        size = format_bytes(self.bytes)
        if self.problems:
            return f"ROUGH, a lower bound: {self.problems[0]}."
        if self.coverage is None:
            return f"{size} by the schedule; the compiler reports no figure."
        share = f"{size} by the schedule, {self.coverage:.0%} of the compiler's"
        if self.agrees:
            return f"{share} {format_bytes(self.compiler_bytes or 0)}."
        total = format_bytes(self.compiler_bytes or 0)
        return f"ROUGH: {share} {total}; trust the shares, not the sizes."


def find_peak(program: Program, memory: Memory) -> Peak | None:
    """Finds the peak; None for a program that is incomplete, not scheduled, or of unknown form."""
    module = program.module
    if module.problems or not module.scheduled:
        return None
    leaves = program.leaves
    numbers = frozenset(n for n, leaf in enumerate(leaves) if leaf.part == "params")
    try:
        liveness = Liveness(module, program.platform, numbers)
    except (LookupError, TypeError, ValueError):
        # Text of a compiler that is not known yet costs the peak, not the whole report.
        return None
    temporary = [buffer for buffer in liveness.buffers() if buffer.argument is None]
    moments = len(liveness.moments)
    alive_at = alive_bytes(temporary, moments)
    moment = max(range(len(alive_at)), key=alive_at.__getitem__)
    alive = sorted((b for b in temporary if b.start <= moment <= b.end), key=lambda b: -b.bytes)
    params = [leaf for leaf in leaves if leaf.part == "params"]
    shards = {_drop_unit_dims(leaf.shard(program.sizes)) for leaf in params}
    gradients = shards | {shape[1:] for shape in shards}  # All layers of a stack, or one of them.
    sources = Sources(program.hlo, module)
    buffers = [_describe_buffer(buffer, gradients, sources) for buffer in alive]
    at = next((p for p in reversed(liveness.moments[:moment]) if p.op_name), None)
    classes = _sum_by_key((buffer.kind, buffer.bytes) for buffer in buffers)
    return Peak(
        bytes=sum(buffer.bytes for buffer in buffers),
        compiler_bytes=_compiler_bytes(program, memory),
        phase=_phase_at(liveness, moment),
        scope=scope_of(at.op_name) if at else "",
        classes={name: classes.get(name, 0) for name in CLASSES},
        scopes=_sum_by_key((buffer.scope, buffer.bytes) for buffer in buffers),
        largest=tuple(buffers[:_LARGEST]),
        problems=tuple(liveness.problems),
        moment=moment,
        history=build_history(
            temporary,
            moments,
            classify=lambda buffer: _classify_buffer(buffer, gradients),
            phase_at=lambda moment: _phase_at(liveness, moment),
            sources=sources,
        ),
    )


def _compiler_bytes(program: Program, memory: Memory) -> int | None:
    if memory.total is None or program.memory.argument is None:
        return None
    return memory.total - program.memory.argument


def _phase_at(liveness: Liveness, moment: int) -> str:
    """Phase of the last instruction up to a moment that has one."""
    before = (liveness.moments[number] for number in range(moment - 1, -1, -1))
    phases = (phase_of(instruction.op_name) for instruction in before)
    return next((phase for phase in phases if phase != "other"), "other")


def _describe_buffer(
    buffer: Buffer, gradients: set[tuple[int, ...]], sources: Sources
) -> LiveBuffer:
    phases = sorted(buffer.phases - {"other"})
    return LiveBuffer(
        kind=_classify_buffer(buffer, gradients),
        shape=str(buffer.shape),
        bytes=buffer.bytes,
        scope=scope_of(buffer.op_name),
        phase=", ".join(phases),
        name=buffer.name,
        op_name=buffer.op_name,
        source=sources.at(buffer.place),
    )


def _classify_buffer(buffer: Buffer, gradients: set[tuple[int, ...]]) -> str:
    if buffer.output:
        return "outputs"
    if buffer.params_only:
        return "weights"
    written, read = buffer.phases & _BACKWARD, buffer.readers & _BACKWARD
    if written and ("update" in buffer.readers or _drop_unit_dims(buffer.shape.dims) in gradients):
        return "gradients"
    if "forward" in buffer.phases and read and not written:
        return "activations"
    return "collectives" if buffer.from_collective else "temporaries"


def _drop_unit_dims(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in dims if n != 1)


def _sum_by_key(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, size in parts:
        sums[name] = sums.get(name, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
