"""What a step failed on, kept so that the step can be made again: state and batch.

A dump is a checkpoint: written atomically, a checksum on every file, restored onto any devices.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, Problem, format_problems
from ..checkpoint import Checkpointer, Keep, Manifest
from ..state import TrainState

DUMPS = "dumps"
_KIND = "step that was not finite"


@dataclasses.dataclass(frozen=True)
class Dump:
    """A dump that was read back.

    Attributes:
      state: before the step.
      batch: that the step read, global rows.
      step: updates that the step would have completed.
      values: the step's metrics, as text where they are not finite.
      config: of the run, plain values.
    """

    state: TrainState
    batch: Any
    step: int
    values: Mapping[str, Any]
    config: Mapping[str, Any]


def write_dump(
    run: Path,
    step: int,
    state: TrainState,
    batch: Any,
    values: Mapping[str, float],
    config: Mapping[str, Any],
) -> Path:
    """Writes a dump into a run's folder; returns the dump's own.

    Args:
      run: folder of the run.
      step: updates that the step would have completed.
      state: before the step.
      batch: that it read, on the devices.
      values: its metrics.
      config: of the run, plain values.

    Raises:
      CheckpointError: it cannot be written.
    """
    folder = run / DUMPS
    about = {"kind": _KIND, "values": {name: str(value) for name, value in values.items()}}
    dumps = Checkpointer(folder, keep=Keep(last=4), config=dict(config))
    dumps.save(step, {"state": state, "batch": batch}, data=about)
    return folder / f"step-{step:08d}"


def dump_manifest(folder: Path) -> Manifest:
    """What a dump says of itself; needs no device.

    Args:
      folder: of the dump, or a run's, of whose dumps the newest is taken.

    Raises:
      CheckpointError: there is no dump.
    """
    root, step = _place(folder)
    dumps, why = Checkpointer(root), "holds no dump" if folder.is_dir() else "is no folder"
    if dumps.steps():
        manifest = dumps.manifest(step)
        if isinstance(manifest.data, dict) and manifest.data.get("kind") == _KIND:
            return manifest
        why = "is a checkpoint, not a dump"
    problem = Problem(str(folder), why, f"RUN/{DUMPS}/step-…, which a stopped run leaves")
    raise CheckpointError(format_problems("There is nothing to replay.", [problem]))


def read_dump(folder: Path, state: Any, batch: Any, to: Any) -> Dump:
    """Reads a dump onto devices.

    Args:
      folder: as for `dump_manifest`.
      state: abstract `TrainState`.
      batch: abstract batch.
      to: one sharding, or `{"state": shardings, "batch": shardings}`.

    Raises:
      CheckpointError: there is no dump, or it is of another model.
      DamageError: it is not what was written.
    """
    manifest = dump_manifest(folder)
    dumps = Checkpointer(_place(folder)[0])
    back = dumps.restore({"state": state, "batch": batch}, to, step=manifest.step)
    made, values = back.state, manifest.data["values"]
    return Dump(made["state"], made["batch"], back.step, values, manifest.config or {})


def _place(folder: Path) -> tuple[Path, int | None]:
    """The folder of dumps and, where one of them is named, its step."""
    if folder.name.startswith("step-") and folder.name[5:].isdigit():
        return folder.parent, int(folder.name[5:])
    return (folder / DUMPS if (folder / DUMPS).is_dir() else folder), None
