"""From a step on disk to a state on devices, by one declared request."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from .._errors import CheckpointError, Problem, raise_all
from ._as_one import as_one
from ._manifest import Manifest
from ._match import by_path, plan
from ._step import SavedStep


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
      state: the state, laid out as asked.
      step: updates that had been made.
      data: state of the data iterator, as it was given to `save`.
      manifest: everything else that was saved with it.
      damaged: newer steps that were passed over, with what is wrong with each.
    """

    state: Any
    step: int
    data: Any
    manifest: Manifest
    damaged: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of a checkpoint; see `Checkpointer.restore`."""

    abstract: Any
    shardings: Any = None
    partial: Mapping[str, str] | None = None
    fresh: Any = None
    cast: Sequence[str] = ()

    def restore(self, folder: Path, damaged: Mapping[int, str]) -> Restored:
        """Reads one step.

        Raises:
          CheckpointError: leaves do not fit; nothing was put on a device.
          DamageError: files or leaves are not what was saved.
        """
        wanted = by_path(self.abstract)
        with as_one():
            saved = SavedStep.open(folder)
            leaves = saved.manifest.leaves
            found = plan(leaves, wanted, self.partial, self.cast, str(folder))
            shardings = self.shardings_of(wanted)
            saved.check_listing()
        fresh = self.fresh_leaves(found.fresh)
        got = fresh | saved.load(found, wanted, shardings)
        structure = jax.tree.structure(self.abstract)
        state = jax.tree.unflatten(structure, [got[path] for path in wanted])
        manifest = saved.manifest
        return Restored(state, manifest.step, manifest.data, manifest, dict(damaged))

    def shardings_of(self, wanted: Mapping[str, Any]) -> dict[str, Sharding]:
        """Where each wanted leaf is to live.

        Raises:
          CheckpointError: it is not said.
        """
        if isinstance(self.shardings, Sharding):
            return dict.fromkeys(wanted, self.shardings)
        given = by_path(self.shardings) if self.shardings is not None else {}
        placed = {path: given.get(path) or x.sharding for path, x in wanted.items()}
        problems = [
            Problem(path, "has no sharding") for path, sharding in placed.items() if not sharding
        ]
        fix = "restore(step.abstract_state, step.shardings), or one sharding for all leaves"
        raise_all(CheckpointError, "It is not said where leaves are to live.", problems, fix)
        return placed

    def fresh_leaves(self, paths: Sequence[str]) -> dict[str, jax.Array]:
        """The leaves that do not come from the checkpoint; made only where there are any.

        Raises:
          CheckpointError: `fresh` lacks one.
        """
        if not paths:
            return {}
        made = by_path(self.fresh() if callable(self.fresh) else self.fresh)
        problems = [
            Problem(path, "is to be fresh, and fresh= has no such leaf")
            for path in paths
            if path not in made
        ]
        fix = "restore(..., fresh=step.init(key))"
        raise_all(CheckpointError, "Fresh leaves are missing.", problems, fix)
        return {path: made[path] for path in paths}
