"""Dumps: the state and the batch of a step that failed, to replay it.

A dump is a checkpoint: written atomically, with checksums, and restorable onto any devices.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._core.errors import CheckpointError
from ..._core.train_state import TrainState
from ...checkpoint import Checkpointer, Manifest, RetentionPolicy

DUMPS = "dumps"
# Stored in manifests; do not change.
_KIND = "step that was not finite"


@dataclasses.dataclass(frozen=True)
class Dump:
    """A dump that was read back.

    Attributes:
      state: before the step.
      batch: input of the step, with all global rows.
      step: number of the update that failed, counted from 1.
      values: the step's metrics, as text.
      config: of the run, as plain values.
    """

    state: TrainState
    batch: Any
    step: int
    values: Mapping[str, Any]
    config: Mapping[str, Any]


def write_dump(
    run: Path,
    step: int,
    *,
    state: TrainState,
    batch: Any,
    values: Mapping[str, float],
    config: Mapping[str, Any],
) -> Path:
    """Writes a dump into the folder of a run, and returns the folder of the dump.

    Args:
      run: folder of the run.
      step: number of the update that failed, counted from 1.
      state: before the step.
      batch: input of the step, on the devices.
      values: its metrics.
      config: of the run, as plain values.

    Raises:
      CheckpointError: it cannot be written.
    """
    folder = run / DUMPS
    about = {"kind": _KIND, "values": {name: str(value) for name, value in values.items()}}
    dumps = Checkpointer(folder, retention=RetentionPolicy(max_to_keep=4), config=dict(config))
    dumps.save(step, {"state": state, "batch": batch}, data=about)
    return folder / f"step-{step:08d}"


def dump_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a dump, without any device.

    Args:
      folder: of the dump; or of the run, for its newest dump.

    Raises:
      CheckpointError: the folder has no dump.
    """
    root, step = _locate(folder)
    dumps = Checkpointer(root)
    why = "contains no dump" if folder.is_dir() else "is not a folder"
    if dumps.steps():
        manifest = dumps.manifest(step)
        if isinstance(manifest.data, dict) and manifest.data.get("kind") == _KIND:
            return manifest
        why = "is a checkpoint, not a dump"
    fix = f"RUN/{DUMPS}/step-…, from a run that stopped"
    raise CheckpointError.of("No dump to replay.", str(folder), why, fix)


def read_dump(folder: Path, state: Any, batch: Any, to: Any) -> Dump:
    """Restores a dump onto devices.

    Args:
      folder: as for `dump_manifest`.
      state: abstract `TrainState`.
      batch: abstract batch.
      to: one sharding, or `{"state": shardings, "batch": shardings}`.

    Raises:
      CheckpointError: the folder has no dump, or the dump is of another model.
      CheckpointCorruptedError: the dump is damaged.
    """
    manifest = dump_manifest(folder)
    dumps = Checkpointer(_locate(folder)[0])
    tree = dumps.restore({"state": state, "batch": batch}, to, step=manifest.step).state
    return Dump(
        state=tree["state"],
        batch=tree["batch"],
        step=manifest.step,
        values=manifest.data["values"],
        config=manifest.config or {},
    )


def _locate(folder: Path) -> tuple[Path, int | None]:
    """Returns the folder of the dumps, and the step if `folder` is a dump: `step-00000007` → 7."""
    if folder.name.startswith("step-") and folder.name[5:].isdigit():
        return folder.parent, int(folder.name[5:])
    return (folder / DUMPS if (folder / DUMPS).is_dir() else folder), None
