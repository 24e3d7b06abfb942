"""`load_step`: a step that starts with the executables that `step.save` wrote."""

import dataclasses
import os
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from .._core.errors import Problem
from ._compiled import CompiledStep
from ._saved_programs import find_obstacle, list_differences, open_programs, warn_stale

if TYPE_CHECKING:
    from ._spec import StepSpec


def load_step(
    path: str | os.PathLike[str], spec: "StepSpec", *, mesh: Mesh | None = None
) -> CompiledStep:
    """Loads a step that `step.save` wrote, which starts without compiling.

    The spec is traced and lowered as always. A saved executable runs only if it was compiled from
    exactly this program, by these versions, with these flags, for these devices; otherwise the
    step compiles, and `sk.SavedStepWarning` says what differs. Line numbers in its report are those
    of the files as they were saved. For several simulated CPU devices, and in several processes, it
    always compiles: their executables can wait for each other without end when they come from a
    file.

    Args:
      path: the file.
      spec: the step.
      mesh: the mesh to run on; None for the devices and axes that it was saved with.

    Returns:
      The step, as `spec.compile(mesh)` returns it.

    Raises:
      StepError: there is no such file; or no mesh is given, and the file cannot be read or its
        devices are not here.
      ShardingError, StepError: as `StepSpec.compile` raises them.
    """
    saved = open_programs(path, mesh)
    if obstacle := find_obstacle(saved.mesh):
        saved = dataclasses.replace(saved, names=frozenset())
        warn_stale(saved.path, [obstacle], fix="spec.compile(mesh) for these devices", stacklevel=3)
    step = CompiledStep(spec, saved.mesh, saved)
    if saved.names and step.program.name not in saved.names:
        differences = list(list_differences(saved))
        other = Problem("the step", "is another program than the one that was saved")
        warn_stale(saved.path, differences or [other], stacklevel=3)
    return step
