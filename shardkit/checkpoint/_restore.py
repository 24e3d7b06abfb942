"""Restores a step from disk to devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from .._core.errors import CheckpointCorruptedError, CheckpointError, Problem, raise_all
from .._core.io._files import os_errors_as
from .._core.train_state import TrainState
from .._core.tree import join_path, leaves_by_path, path_str, short_type
from ._collective_errors import collective_errors
from ._manifest import Manifest
from ._match import plan_restore
from ._step import SavedStep


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state.

    Attributes:
      state: the state, with the requested shardings.
      step: number of updates made.
      data: state of the data iterator, as given to `save`.
      manifest: everything else that was saved with it.
      damaged: newer steps that were skipped, with what is wrong with each.
    """

    state: Any
    step: int
    data: Any
    manifest: Manifest
    damaged: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class RestoreRequest:
    """The arguments of `Checkpointer.restore`, which describes them."""

    abstract: Any
    shardings: Any = None
    partial: Mapping[str, str] | None = None
    fresh: Any = None
    cast: Sequence[str] = ()
    rename: Mapping[str, str] | None = None

    def restore(self, folder: Path, damaged: Mapping[int, str]) -> Restored:
        """Reads one step.

        Raises CheckpointError, before anything is on a device, if leaves do not fit, and
        CheckpointCorruptedError if files or leaves are not what was saved.
        """
        wanted = leaves_by_path(self.abstract)
        cannot_read = os_errors_as(
            CheckpointCorruptedError, "The checkpoint cannot be read.", folder, "chmod -R u+rX"
        )
        with collective_errors(), cannot_read:
            saved = SavedStep.open(folder)
            counters, flags = _find_counters_and_flags(self.abstract)
            plan = plan_restore(
                saved.manifest.leaves,
                wanted,
                partial=self.partial,
                cast=self.cast,
                where=str(folder),
                assumed=flags,
                rename=self.rename,
            )
            shardings = self.shardings_of(wanted)
            saved.check_listing()
        fresh = self.fresh_leaves(plan.fresh)
        loaded = saved.load(plan, wanted, shardings)
        _check_counters(folder, {p: x for p, x in loaded.items() if p in counters})
        leaves = fresh | loaded | {path: _make_false(shardings[path]) for path in plan.assumed}
        structure = jax.tree.structure(self.abstract)
        state = jax.tree.unflatten(structure, [leaves[path] for path in wanted])
        manifest = saved.manifest
        return Restored(state, manifest.step, manifest.data, manifest, dict(damaged))

    def shardings_of(self, wanted: Mapping[str, Any]) -> dict[str, Sharding]:
        """Returns the sharding of each leaf; raises CheckpointError if one has none."""
        if isinstance(self.shardings, Sharding):
            return dict.fromkeys(wanted, self.shardings)
        declared = leaves_by_path(self.shardings) if self.shardings is not None else {}
        shardings = {path: declared.get(path) or x.sharding for path, x in wanted.items()}
        problems = [
            Problem(path, "has no sharding") for path, sharding in shardings.items() if not sharding
        ]
        fix = "restore(step.abstract_state, step.shardings), or one sharding for all leaves"
        raise_all(CheckpointError, "Leaves to restore have no sharding.", problems, fix)
        return shardings

    def fresh_leaves(self, paths: Sequence[str]) -> dict[str, jax.Array]:
        """Returns the leaves that do not come from the checkpoint; calls `fresh` only if needed.

        Raises:
          CheckpointError: `fresh` lacks one, or has it in another shape or dtype.
        """
        if not paths:
            return {}
        fresh = leaves_by_path(self.fresh() if callable(self.fresh) else self.fresh)
        problems = [
            Problem(path, "is fresh in partial, but fresh= has no such leaf")
            for path in paths
            if path not in fresh
        ]
        fix = "restore(..., fresh=step.init(key))"
        raise_all(CheckpointError, "Fresh leaves are missing.", problems, fix)
        wanted = leaves_by_path(self.abstract)
        types = {path: short_type(tuple(wanted[path].shape), wanted[path].dtype) for path in paths}
        problems = [
            Problem(path, f"is {found} in fresh=, and {want} is wanted")
            for path, want in types.items()
            if (found := _type_of(fresh[path])) != want
        ]
        raise_all(CheckpointError, "Fresh leaves do not fit.", problems, fix)
        shardings = self.shardings_of({path: wanted[path] for path in paths})
        return {path: jax.device_put(fresh[path], shardings[path]) for path in paths}


def _type_of(x: Any) -> str:
    """`f32[2,3]`; of what is no array its type."""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return short_type(tuple(x.shape), x.dtype) if is_array else type(x).__name__


def _find_counters_and_flags(tree: Any) -> tuple[set[str], set[str]]:
    """Returns the paths of `step` and of `halted` in every `TrainState` of a tree."""
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, TrainState))
    states = [path_str(path) for path, x in keyed if isinstance(x, TrainState)]
    return {join_path(s, "step") for s in states}, {join_path(s, "halted") for s in states}


def _check_counters(folder: Path, counters: Mapping[str, jax.Array]) -> None:
    """Refuses checkpoints of a halted run from before states had `halted`.

    They have a negative `step`. Other checkpoints without `halted` are read as not halted.
    """
    values = {path: int(np.asarray(x.addressable_data(0))) for path, x in counters.items()}
    problems = [
        Problem(path, f"is {n}: an update was not finite after {~n} updates, and stopped the run")
        for path, n in values.items()
        if n < 0
    ]
    headline = f"{folder} holds a halted state in a form that is no longer supported."
    raise_all(CheckpointError, headline, problems, "restore(..., step=...) of an earlier step")


def _make_false(sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.zeros((), bool))
