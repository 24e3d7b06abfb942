"""Checks that a compiled step fits on its devices, before anything is allocated on them."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from .._core.errors import StepError
from .._core.tree import format_bytes
from ..report import CompiledBytes, Memory, Program, read_memory, suggest_memory_savings
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram
from ._layout import StepLayout
from ._report import list_arguments

_PARTS = ("params", "opt_state", "model_state", "batch", "temp")


def check_memory(bound: BoundSpec, layout: StepLayout, compiled: CompiledProgram) -> None:
    """Raises StepError, with the bytes of each part, if a step does not fit on its devices.

    Devices whose memory is not known pass.
    """
    mesh = bound.mesh
    device = mesh.devices.flat[0]
    program = Program(
        hlo="",
        mesh=tuple(mesh.shape.items()),
        platform=device.platform,
        device_kind=device.device_kind,
        leaves=tuple(list_arguments(bound, layout)),
        memory=CompiledBytes.of(compiled.compiled.memory_analysis()),
    )
    memory = read_memory(program)
    limit = min(_memory_limits(memory, mesh), default=None)
    if limit is None or memory.total is None or memory.total <= limit:
        return
    parts = ", ".join(
        f"{part} {format_bytes(size)}" for part in _PARTS if (size := getattr(memory, part))
    )
    why = f"needs {format_bytes(memory.total)} of {format_bytes(limit)}: {parts}"
    subject = f"each of {mesh.size} x {device.device_kind}"
    savings = suggest_memory_savings(memory, program.leaves, program.sizes, room=limit)
    fix = "; or ".join(savings[:3]) or "more devices"
    raise StepError.of("The step does not fit on its devices.", subject, why, fix)


def _memory_limits(memory: Memory, mesh: Mesh) -> Iterator[int]:
    """Bytes of a device's memory: by the hardware table, and by its runtime."""
    if memory.capacity is not None:
        yield memory.capacity
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    limit = (local[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        yield limit
