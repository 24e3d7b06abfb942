"""Bytes per device of a compiled step by class, and the capacity of the device."""

import dataclasses

from ...hardware import identify_chip
from .._placed_leaf import PARTS
from .._program import CompiledBytes, Program

MEMORY_CLASSES = (*PARTS, "padding", "output", "temp")
"""Fields of `Memory` that hold bytes of one class, in the order of tables."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Bytes of the inputs are exact, from the shardings; the others are the compiler's.

    Attributes:
      params: parameters.
      opt_state: optimizer state.
      model_state: mutable model state.
      batch: the device's share of one global batch.
      rest: step counter and random key.
      padding: bytes that the compiler's tiled layouts add to the arguments.
      output: outputs that reuse no input.
      temp: peak of gradients, activations and scratch.
      total: peak of all of them; None if the compiler does not report it.
      capacity: memory of the device; None if unknown, as for simulated devices.
      problems: contradictions between executable and shardings.
    """

    params: int
    opt_state: int
    model_state: int
    batch: int
    rest: int
    padding: int | None
    output: int | None
    temp: int | None
    total: int | None
    capacity: int | None
    problems: tuple[str, ...] = ()

    @property
    def arguments(self) -> int:
        """Bytes of all inputs, from the shardings."""
        return self.params + self.opt_state + self.model_state + self.batch + self.rest

    @property
    def margin(self) -> int | None:
        """Bytes left on the device, negative where it does not fit; None if unknown."""
        if self.total is None or self.capacity is None:
            return None
        return self.capacity - self.total

    @property
    def fits(self) -> bool | None:
        """Whether the step fits on the device; None if unknown."""
        return None if self.margin is None else self.margin >= 0


def read_memory(program: Program) -> Memory:
    """Adds up a step's bytes per device."""
    sizes, chip = program.sizes, identify_chip(program.device_kind)
    parts = {
        part: sum(leaf.device_bytes(sizes) for leaf in program.leaves if leaf.part == part)
        for part in PARTS
    }
    compiled = program.memory
    declared = sum(parts.values())
    padding = None if compiled.argument is None else compiled.argument - declared
    return Memory(
        **parts,
        padding=padding,
        output=_subtract(compiled.output, compiled.alias),
        temp=compiled.temp,
        total=_total_bytes(compiled, program.platform),
        capacity=chip.memory if chip else None,
        problems=_find_contradictions(program, declared, padding),
    )


def _total_bytes(compiled: CompiledBytes, platform: str) -> int | None:
    # On CPU XLA reports a peak that is smaller than its temporaries alone.
    if platform != "cpu" and compiled.peak is not None:
        return compiled.peak
    output = _subtract(compiled.output, compiled.alias)
    if compiled.argument is None or compiled.temp is None or output is None:
        return None
    return compiled.argument + output + compiled.temp


def _subtract(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def _find_contradictions(program: Program, declared: int, padding: int | None) -> tuple[str, ...]:
    """Reports argument bytes that tiling cannot explain: tiles only add bytes, and none on CPU."""
    if padding is None or not program.leaves or padding == 0:
        return ()
    if padding > 0 and program.platform != "cpu":
        return ()
    stated = program.memory.argument
    return (f"the executable takes {stated} bytes of arguments, the shardings {declared}",)
