"""What lives on a device at the moment at which a step holds most, by class and by scope.

The compiler gives one figure for everything that it allocates. Its schedule tells what that is.
The sum is held beside the compiler's figure, and the split is only called one where they agree.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from ..._core.tree import format_bytes
from .._program import Program
from ..hlo._scope import phase_of, scope_of
from ._liveness import Buffer, Lives
from ._memory import Memory

CLASSES = ("gradients", "activations", "weights", "collectives", "outputs", "temporaries")
_CLOSE = 0.1
_LARGEST = 24
_BACKWARD = frozenset({"backward", "recompute"})


@dataclasses.dataclass(frozen=True)
class Held:
    """A buffer that is alive at the peak.

    Attributes:
      kind: one of `CLASSES`.
      shape: type of the array on one device: `f32[4,16]`.
      bytes: bytes in the device's memory, with the padding of its layout.
      scope: the model's scope that made it.
      phase: parts of the step that write it: `forward, backward`.
      name: name of the HLO instruction.
      op_name: JAX's path for it.
    """

    kind: str
    shape: str
    bytes: int
    scope: str
    phase: str
    name: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is alive beside its arguments.

    Found from the schedule: compiled, but not by the compiler's own account, which `said` is.
    Classes are told by what writes and reads a buffer:

    * gradients: written backward, in the shape of a parameter's shard or read by the update;
    * activations: written forward, read backward;
    * weights: made of parameters alone: gathered, cast or copied;
    * collectives: what other collectives bring;
    * outputs: results of the step that reuse no input;
    * temporaries: all else.

    Attributes:
      bytes: alive at the moment, beside the arguments of the step.
      said: what the compiler counts beside the arguments; None where it does not say.
      phase: part of the step that the moment is in.
      scope: the model's scope that it is in.
      classes: class → bytes; adds up to `bytes`.
      scopes: scope → bytes, the most first; adds up to `bytes`.
      held: the largest buffers, the largest first.
      problems: what could not be followed; with any, `bytes` is a lower bound.
    """

    bytes: int
    said: int | None
    phase: str
    scope: str
    classes: Mapping[str, int]
    scopes: Mapping[str, int]
    held: tuple[Held, ...]
    problems: tuple[str, ...] = ()

    @property
    def coverage(self) -> float | None:
        """`bytes` ÷ what the compiler counts; None where it does not say."""
        return self.bytes / self.said if self.said else None

    @property
    def close(self) -> bool:
        """Found and said agree within a tenth: the split is one of what the compiler counts."""
        off = None if self.coverage is None else abs(self.coverage - 1)
        return off is not None and off <= _CLOSE and not self.problems

    def __str__(self) -> str:
        """Returns one sentence: when, which classes, and how far it agrees with the compiler."""
        mark = "" if self.close else "~"
        parts = [f"{name} {mark}{format_bytes(n)}" for name, n in self.classes.items() if n]
        where = f"{self.phase}{', ' if self.scope else ''}{self.scope}"
        text = f"Beside the arguments, at the peak ({where}): {'; '.join(parts) or 'nothing'}"
        return f"{text}. {self._agreement()}"

    def _agreement(self) -> str:
        found = format_bytes(self.bytes)
        if self.problems:
            return f"ROUGH, a lower bound: {self.problems[0]}."
        if self.coverage is None:
            return f"{found} by the schedule; the compiler does not say."
        share = f"{found} by the schedule, {self.coverage:.0%} of the compiler's"
        if self.close:
            return f"{share} {format_bytes(self.said or 0)}."
        return f"ROUGH: {share} {format_bytes(self.said or 0)}; shares, not sizes, mean something."


def peak_of(program: Program, memory: Memory) -> Peak | None:
    """Finds the peak of a scheduled program.

    None where its text is not whole, not scheduled, or in a form that cannot be followed.
    """
    module = program.module
    if module.problems or not module.scheduled:
        return None
    leaves = program.leaves
    numbers = frozenset(n for n, leaf in enumerate(leaves) if leaf.part == "params")
    try:
        lives = Lives(module, program.platform, numbers)
    except (LookupError, TypeError, ValueError):
        # A form of text that no compiler has shown yet is to cost the split, not the report.
        return None
    beside = [one for one in lives.buffers() if one.argument is None]
    moment = _fullest(beside, len(lives.moments))
    alive = sorted((b for b in beside if b.start <= moment <= b.end), key=lambda b: -b.bytes)
    shapes = {_squeezed(leaf.shard(program.sizes)) for leaf in leaves if leaf.part == "params"}
    held = [_held(one, shapes | {shape[1:] for shape in shapes}) for one in alive]
    at = next((p for p in reversed(lives.moments[:moment]) if p.op_name), None)
    classes = _summed((one.kind, one.bytes) for one in held)
    return Peak(
        bytes=sum(one.bytes for one in held),
        said=_said(program, memory),
        phase=_phase_at(lives, moment),
        scope=scope_of(at.op_name) if at else "",
        classes={name: classes.get(name, 0) for name in CLASSES},
        scopes=_summed((one.scope, one.bytes) for one in held),
        held=tuple(held[:_LARGEST]),
        problems=tuple(lives.problems),
    )


def _said(program: Program, memory: Memory) -> int | None:
    if memory.total is None or program.memory.argument is None:
        return None
    return memory.total - program.memory.argument


def _phase_at(lives: Lives, moment: int) -> str:
    """Phase of the last instruction up to a moment that belongs to one."""
    phases = (phase_of(one.op_name) for one in reversed(lives.moments[:moment]))
    return next((phase for phase in phases if phase != "other"), "other")


def _fullest(buffers: Iterable[Buffer], moments: int) -> int:
    change = [0] * (moments + 2)
    for one in buffers:
        change[one.start] += one.bytes
        change[one.end + 1] -= one.bytes
    alive = list(itertools.accumulate(change))
    return max(range(len(alive)), key=alive.__getitem__)


def _held(one: Buffer, gradients: set[tuple[int, ...]]) -> Held:
    phases = sorted(one.phases - {"other"})
    return Held(
        kind=_kind(one, gradients),
        shape=str(one.shape),
        bytes=one.bytes,
        scope=scope_of(one.op_name),
        phase=", ".join(phases),
        name=one.name,
        op_name=one.op_name,
    )


def _kind(one: Buffer, gradients: set[tuple[int, ...]]) -> str:
    if one.output:
        return "outputs"
    if one.weight:
        return "weights"
    written, read = one.phases & _BACKWARD, one.readers & _BACKWARD
    if written and ("update" in one.readers or _squeezed(one.shape.dims) in gradients):
        return "gradients"
    if "forward" in one.phases and read and not written:
        return "activations"
    return "collectives" if one.sent else "temporaries"


def _squeezed(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in dims if n != 1)


def _summed(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in parts:
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))
