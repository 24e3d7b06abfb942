"""`trainable=` as a tree of booleans, by the paths that it shares with the parameters."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, final

import jax
import numpy as np

from .errors import Problem, did_you_mean
from .tree import join_path, leaves_by_path


@final
@dataclasses.dataclass(frozen=True)
class TrainableTree:
    """Which parameters are trained, by booleans that each stand for all below their path.

    >>> tree = parse_trainable({"body": False, "head": {"kernel": True, "bias": False}})
    >>> tree("body/0/kernel"), tree("head/kernel")
    (False, True)
    """

    flags: tuple[tuple[str, bool], ...]  # path → whether what is there is trained

    def __call__(self, path: str) -> bool:
        """Whether the parameter at a path is trained."""
        return any(flag for at, flag in self.flags if _is_within(path, at))

    def problems(self, paths: Sequence[str]) -> Iterator[Problem]:
        """Booleans of no parameter, and parameters of these paths without a boolean."""
        for at, flag in self.flags:
            # The filter of an Equinox module also has False for what is no parameter.
            if flag and not any(_is_within(path, at) for path in paths):
                why = f"is True, and no parameter is there.{did_you_mean(at, paths)}"
                yield Problem(join_path("trainable", at), why)
        for path in paths:
            if not any(_is_within(path, at) for at, _ in self.flags):
                yield Problem(path, "has no boolean in trainable=, nor has what it is in")


def parse_trainable(declared: Any) -> Any:
    """Returns what `trainable=` declares, with a `TrainableTree` for a tree of booleans."""
    leaves = jax.tree.leaves(declared)
    if not leaves or not all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
        return declared
    return TrainableTree(tuple((p, bool(x)) for p, x in leaves_by_path(declared).items()))


def _is_within(path: str, at: str) -> bool:
    return not at or path == at or path.startswith(f"{at}/")
