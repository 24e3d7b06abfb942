"""From a step on disk to a state on devices, by one declared request."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from .._core.errors import CheckpointError, Problem, raise_all
from .._core.train_state import TrainState
from .._core.tree import join_path, leaves_by_path, path_str
from ._collective_errors import as_one
from ._manifest import Manifest
from ._match import plan
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
          CheckpointCorruptedError: files or leaves are not what was saved.
        """
        wanted = leaves_by_path(self.abstract)
        with as_one():
            saved = SavedStep.open(folder)
            leaves = saved.manifest.leaves
            counters, flags = _of_train_states(self.abstract)
            found = plan(leaves, wanted, self.partial, self.cast, str(folder), flags)
            shardings = self.shardings_of(wanted)
            saved.check_listing()
        fresh = self.fresh_leaves(found.fresh)
        loaded = saved.load(found, wanted, shardings)
        _check_counters(folder, {p: x for p, x in loaded.items() if p in counters})
        got = fresh | loaded | {path: _false(shardings[path]) for path in found.assumed}
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
        given = leaves_by_path(self.shardings) if self.shardings is not None else {}
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
        made = leaves_by_path(self.fresh() if callable(self.fresh) else self.fresh)
        problems = [
            Problem(path, "is to be fresh, and fresh= has no such leaf")
            for path in paths
            if path not in made
        ]
        fix = "restore(..., fresh=step.init(key))"
        raise_all(CheckpointError, "Fresh leaves are missing.", problems, fix)
        return {path: made[path] for path in paths}


def _of_train_states(tree: Any) -> tuple[set[str], set[str]]:
    """Paths of the counters and of the `halted` flags of every `TrainState` in a tree."""
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, TrainState))
    states = [path_str(path) for path, x in keyed if isinstance(x, TrainState)]
    return {join_path(one, "step") for one in states}, {join_path(one, "halted") for one in states}


def _check_counters(folder: Path, counters: Mapping[str, jax.Array]) -> None:
    """Refuses what a stopped step left before states had `halted`: its counter is negative.

    A checkpoint without `halted` is otherwise read as one that is not halted.
    """
    values = {path: int(np.asarray(x.addressable_data(0))) for path, x in counters.items()}
    problems = [
        Problem(path, f"is {n}: an update was not finite after {~n} updates, and stopped the run")
        for path, n in values.items()
        if n < 0
    ]
    headline = f"{folder} holds the state of a stopped step, in a form that is read no more."
    raise_all(CheckpointError, headline, problems, "restore(..., step=...) of an earlier step")


def _false(sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.zeros((), bool))
