"""Whether a compiled step fits on its devices, said before anything is put on them."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, raise_all
from .._core.tree import format_bytes
from ..report import CompiledBytes, Memory, Program, advice, read_memory
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram as Executable
from ._layout import StepLayout
from ._report import list_arguments

_PARTS = ("params", "opt_state", "model_state", "batch", "temp")


def check_memory(bound: BoundSpec, layout: StepLayout, made: Executable) -> None:
    """Refuses a step that is larger than its devices, as far as their memory is known.

    Raises:
      StepError: with the bytes of each part, and what would make it fit.
    """
    mesh = bound.mesh
    device = mesh.devices.flat[0]
    program = Program(
        hlo="",
        mesh=tuple(mesh.shape.items()),
        platform=device.platform,
        device_kind=device.device_kind,
        leaves=tuple(list_arguments(bound, layout)),
        memory=CompiledBytes.of(made.compiled.memory_analysis()),
    )
    memory = read_memory(program)
    room = min(_memory_limits(memory, mesh), default=None)
    if room is None or memory.total is None or memory.total <= room:
        return
    parts = ", ".join(
        f"{part} {format_bytes(size)}" for part in _PARTS if (size := getattr(memory, part))
    )
    why = f"needs {format_bytes(memory.total)} of {format_bytes(room)}: {parts}"
    problem = Problem(f"each of {mesh.size} x {device.device_kind}", why)
    savings = advice(memory, program.leaves, program.sizes, room=room)
    fix = "; or ".join(savings[:3]) or "more devices"
    raise_all(StepError, "The step does not fit on its devices.", [problem], fix)


def _memory_limits(memory: Memory, mesh: Mesh) -> Iterator[int]:
    """Bytes that a device has by the hardware table, and that its runtime gives out."""
    if memory.capacity is not None:
        yield memory.capacity
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    limit = (own[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        yield limit
