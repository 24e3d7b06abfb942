"""Which parameters a spec trains: its declaration against the leaves that `init` returns."""

from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .._core.errors import Problem, StepError, did_you_mean, raise_all
from .._core.partition import Partition
from .._core.precision import Precision
from .._core.trainable import TrainableTree
from .._core.tree import Leaf, list_leaves
from .._core.types import Loss, Params, Trainable
from ..rules import matches, selects

if TYPE_CHECKING:
    from ._spec import StepSpec


def is_trainable(declared: object) -> bool:
    """Whether a value is globs, a predicate, a tree of booleans, or None."""
    if declared is None or isinstance(declared, str) or callable(declared):
        return True
    globs = isinstance(declared, Sequence | Set)
    return globs and all(isinstance(glob, str) for glob in declared)


def find_partition(spec: "StepSpec", params: Params) -> Partition:
    """Finds the frozen parameters of a spec, by `trainable` of its own or of its `sk.Loss`.

    Parameters are concrete or abstract. Raises StepError if a glob matches none, none is trained,
    or one that is trained is not floating-point of at least 16 bits.
    """
    loss = spec.loss_fn
    declared = spec.trainable
    if declared is None and isinstance(loss, Loss):
        declared = loss.trainable
    leaves = list_leaves(params)
    trained = leaves if declared is None else _select(declared, leaves)
    problems = list(_find_problems(trained, spec.precision))
    raise_all(StepError, "Some parameters cannot be trained.", problems)
    kept = {leaf.path for leaf in trained}
    return Partition(frozenset(leaf.path for leaf in leaves) - kept)


def _select(declared: Trainable, leaves: Sequence[Leaf]) -> list[Leaf]:
    paths = [leaf.path for leaf in leaves]
    problems = list(_selection_problems(declared, paths)) if leaves else []
    such = f", such as {paths[0]!r}" if paths else ""
    fix = f"paths of parameters{such}; or leave trainable out to train all"
    raise_all(StepError, "The trained parameters are declared wrongly.", problems, fix)
    return [leaf for leaf in leaves if selects(declared, leaf.path)]


def _selection_problems(declared: Trainable, paths: Sequence[str]) -> Iterator[Problem]:
    """Globs and booleans that stand for nothing, and declarations that choose nothing."""
    found = list(declared.problems(paths)) if isinstance(declared, TrainableTree) else []
    why = f"selects none of the {len(paths)} parameters."
    if isinstance(declared, str) or not callable(declared):
        for glob in [declared] if isinstance(declared, str) else declared or ():
            if not any(matches(glob, path) for path in paths):
                found.append(Problem(f"trainable={glob!r}", why + did_you_mean(glob, paths)))
    if not found and not any(selects(declared, path) for path in paths):
        found.append(Problem("trainable", why))
    yield from found


def _find_problems(trained: Sequence[Leaf], precision: Precision) -> Iterator[Problem]:
    compute = precision.compute_dtype
    only_complex = all(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in trained)
    if trained and only_complex and compute in ("bfloat16", "float16"):
        why = "changes no parameter: all are complex, and no complex dtype has parts of 16 bits"
        yield Problem(f"precision.compute_dtype={compute!r}", why, "precision=sk.Precision()")
    for leaf in trained:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            why = "is not a floating-point array, so it has no gradient"
            fix = "leave it out of trainable=; or return sk.Variables(params, model_state) from "
            yield Problem(str(leaf), why, f"{fix}init, with it in model_state")
        elif precision.param_dtype is None and jnp.finfo(leaf.dtype).bits < 16:
            why = "has too few bits to sum gradients or updates in"
            fix = 'precision=sk.Precision(param_dtype="float32"), and a cast in the loss'
            yield Problem(str(leaf), why, fix)
