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
    """A dump that was read back."""

    state: TrainState  # before the step
    batch: Any  # input of the step, with all global rows
    step: int  # number of the update that failed, counted from 1
    values: Mapping[str, Any]  # the step's metrics, as text
    config: Mapping[str, Any]  # of the run, as plain values


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

    `step` numbers the update that failed, from 1; the state is that before it, the batch its input
    on the devices, values its metrics. Raises CheckpointError if it cannot be written.
    """
    folder = run / DUMPS
    about = {"kind": _KIND, "values": {name: str(value) for name, value in values.items()}}
    dumps = Checkpointer(folder, retention=RetentionPolicy(max_to_keep=4), config=dict(config))
    dumps.save(step, {"state": state, "batch": batch}, data=about)
    return folder / f"step-{step:08d}"


def dump_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a dump, or of a run's newest dump, without any device.

    Raises CheckpointError if the folder has no dump.
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
    """Restores a dump of abstract state and batch onto devices.

    `to` is one sharding, or `{"state": shardings, "batch": shardings}`. Raises CheckpointError if
    the folder, as for `dump_manifest`, has no dump, or the dump is of another model;
    CheckpointCorruptedError if it is damaged.
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
