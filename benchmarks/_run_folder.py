"""What a run left in its folder, read while it goes on or after it was killed."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

import shardkit as sk


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics file."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(folder: pathlib.Path) -> int:
    """The newest step in the metrics."""
    return max((row["step"] for row in read_metrics(folder) if row["kind"] == "step"), default=0)


def saved_leaves(folder: pathlib.Path, step: int, *parts: str) -> dict[str, np.ndarray]:
    """Leaves of parts of a saved state, such as `params`, on one device, by path."""
    checkpoints = sk.Checkpointer(folder / "checkpoints")
    like = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in checkpoints.manifest(step).leaves.items()
        if path.partition("/")[0] in parts
    }
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    partial = {f"{part}/**": "saved" for part in parts} | {"**": "drop"}
    restored = checkpoints.restore(like, where, step=step, partial=partial)
    return {path: np.asarray(x) for path, x in restored.state.items()}
