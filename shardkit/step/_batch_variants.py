"""Batches whose shapes or dtypes differ from the declared ones: a warning and an own program.

JAX traces a function again for four reasons; three of them cannot occur in a step. Weakly typed
values run the same program, arrays on other devices or in other layouts raise an error, and the
state keeps its shapes and dtypes. The fourth, another shape or dtype of a batch leaf, is a variant.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._core.errors import (
    BatchError,
    Problem,
    RetraceWarning,
    ShardingError,
    first_line,
    format_problems,
)
from .._core.tree import flatten_tree, leaves_by_path, short_type
from .._core.types import Batch
from ._bound_spec import BoundSpec
from ._compiled_functions import CompiledFunctions

# Batch variants that a step keeps: enough for lengths in buckets, each with up to 3 executables.
KEPT = 8

LeafTypes = tuple[tuple[tuple[int, ...], np.dtype], ...]


class BatchVariants:
    """The declared batch variant and the `KEPT` others that were used last."""

    def __init__(self, bound: BoundSpec) -> None:
        """Resolves the declared variant."""
        self.declared = CompiledFunctions(bound)
        self._bound = bound
        self._others: dict[LeafTypes, CompiledFunctions] = {}  # least recently used first
        self.changes: list[str] = []  # how each other compiled variant differs, as text

    def find(self, batch: Batch) -> CompiledFunctions:
        """Returns a batch's variant, compiled on first use; the declared one if it is invalid."""
        leaves, structure = flatten_tree(batch, "batch")
        declared, declared_structure = jax.tree.flatten(self.declared.layout.batch)
        if structure != declared_structure or all(map(_has_type, leaves, declared)):
            return self.declared
        types = tuple(map(_leaf_type, leaves))
        if types in self._others:
            self._others[types] = self._others.pop(types)
            return self._others[types]
        changes = list(_list_changes(self.declared.layout.batch, types))
        same_ranks = [len(shape) for shape, _ in types] == [a.ndim for a in declared]
        allowed = self._bound.spec.on_retrace == "warn" and jax.process_count() == 1
        if not changes or not same_ranks or not allowed:
            return self.declared
        return self._add(structure, types, changes)

    def explain(self, batch: Batch, error: Exception) -> BatchError:
        """The error for a batch unlike the declared one that the user's functions cannot take."""
        leaves, _ = flatten_tree(batch, "batch")
        changes = _list_changes(self.declared.layout.batch, tuple(map(_leaf_type, leaves)))
        why = f"cannot be traced with it: {first_line(error)}"
        problems = [*changes, Problem("loss_fn", why)]
        fix = (
            "the declared shapes and dtypes; or compile_step(..., batch=...) with those of the data"
        )
        return BatchError(format_problems("The step does not take this batch.", problems, fix))

    def _add(self, structure: Any, types: LeafTypes, changes: list[Problem]) -> CompiledFunctions:
        batch = structure.unflatten([jax.ShapeDtypeStruct(*leaf_type) for leaf_type in types])
        spec = self._bound.spec.replace(batch=batch)
        bound = dataclasses.replace(self._bound, spec=spec)
        try:
            variant = CompiledFunctions(bound)
        except ShardingError:
            return self.declared
        self._others[types] = variant
        if len(self._others) > KEPT:
            del self._others[next(iter(self._others))]
        self.changes.append(", ".join(f"{change.subject} {change.why}" for change in changes))
        total = 1 + len(self.changes)
        headline = f"The step compiles another batch variant; it now has {total}."
        fix = 'pad all batches alike; or compile_step(..., on_retrace="error") to raise here'
        # Level 4: the user's call of the step, above `CompiledStep._run`, `find` and this.
        warnings.warn(format_problems(headline, changes, fix), RetraceWarning, stacklevel=4)
        return variant


def _has_type(x: Any, like: jax.ShapeDtypeStruct) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and (x.shape, x.dtype) == (like.shape, like.dtype)


def _leaf_type(x: Any) -> tuple[tuple[int, ...], np.dtype]:
    return np.shape(x), jax.dtypes.canonicalize_dtype(jax.numpy.result_type(x))


def _list_changes(declared: Batch, types: LeafTypes) -> Iterator[Problem]:
    by_path = leaves_by_path(declared, "batch").items()
    for (path, a), (shape, dtype) in zip(by_path, types, strict=True):
        changed = ["shape"] * (a.shape != shape) + ["dtype"] * (a.dtype != dtype)
        if changed:
            change = f"{short_type(a.shape, a.dtype)}, is {short_type(shape, dtype)}"
            yield Problem(path, f"changed its {' and '.join(changed)}: declared as {change}")
