"""Deletes what the policy does not keep."""

from pathlib import Path

from .._errors import CheckpointError
from ._files import delete_step, list_steps, step_folder
from ._keep import Keep
from ._manifest import read_manifest


def retain(root: Path, keep: Keep) -> None:
    """Deletes every complete step that the policy does not keep.

    A step whose manifest cannot be read is no one's to judge: it stays.
    """
    scores = {}
    for step in list_steps(root):
        try:
            scores[step] = read_manifest(step_folder(root, step)).metrics
        except CheckpointError:
            continue
    for step in set(scores) - keep.kept(scores):
        delete_step(root, step)
