"""Bytes per device of a compiled step, by what they hold, against what the device has."""

import dataclasses

from ...hardware import identify_chip
from .._program import PARTS, CompiledBytes, Program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    The parts of the input are exact, from the shardings. What the compiler adds is compiled.

    Attributes:
      params: parameters.
      opt_state: optimizer state.
      model_state: mutable model state.
      batch: one global batch's share.
      rest: step counter and random key.
      padding: what the compiler adds to the arguments for its tiled layouts.
      output: outputs that reuse no input.
      temp: gradients, activations and scratch that are alive at once.
      total: the most that is alive at once; None where the compiler does not say.
      capacity: what the device has; None where unknown, as on simulated devices.
      problems: where executable and shardings contradict each other.
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
    said = program.memory
    declared = sum(parts.values())
    padding = None if said.argument is None else said.argument - declared
    return Memory(
        **parts,
        padding=padding,
        output=_difference(said.output, said.alias),
        temp=said.temp,
        total=_total(said, program.platform),
        capacity=chip.memory if chip else None,
        problems=_contradictions(program, declared, padding),
    )


def _total(said: CompiledBytes, platform: str) -> int | None:
    # On CPU the peak that XLA reports is below what its temporaries alone take.
    if platform != "cpu" and said.peak is not None:
        return said.peak
    output = _difference(said.output, said.alias)
    if said.argument is None or said.temp is None or output is None:
        return None
    return said.argument + output + said.temp


def _difference(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def _contradictions(program: Program, declared: int, padding: int | None) -> tuple[str, ...]:
    """Argument bytes that tiling cannot explain: it only adds, and on CPU adds nothing."""
    if padding is None or not program.leaves or padding == 0:
        return ()
    if padding > 0 and program.platform != "cpu":
        return ()
    said = program.memory.argument
    return (f"the executable takes {said} bytes of arguments, the shardings make {declared}",)
