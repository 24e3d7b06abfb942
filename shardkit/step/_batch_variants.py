"""Batches of another form than the declared one: told by a warning, run by a program of their own.

A second trace has four causes. Lengths and dtypes of a batch are in here. What is weakly typed is
the same program, an array on other devices or in another layout is an error that names both, and
a state never changes its form.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._core.errors import Problem, RetraceWarning, ShardingError, format_problems
from .._core.tree import leaves_by_path, short_type
from ._bound_spec import BoundSpec
from ._compile import no_ambient_mesh
from ._compiled_functions import CompiledFunctions
from ._layout import Layout, resolve_layout

# Lengths in buckets are few; each form holds up to three executables, on host and devices.
KEPT = 8

Types = tuple[tuple[tuple[int, ...], np.dtype], ...]


@dataclasses.dataclass(frozen=True)
class BatchVariant:
    """A spec for batches of one form, resolved on its mesh.

    Attributes:
      layout: abstract state and batch, and the sharding of every leaf.
      programs: each compiled when it is first asked for.
    """

    layout: Layout
    programs: CompiledFunctions

    @classmethod
    def of(cls, bound: BoundSpec) -> "BatchVariant":
        """Resolves a spec on its mesh.

        Raises:
          ShardingError: every leaf that cannot be laid out.
        """
        spec = bound.spec
        layout = resolve_layout(
            init=spec.init,
            optimizer=spec.optimizer,
            batch=spec.batch,
            mesh=bound.mesh,
            strategy=spec.strategy,
            precision=spec.precision,
            steps=spec.accumulate.micro_batches,
        )
        return cls(layout, CompiledFunctions(bound, layout))


class BatchVariants:
    """The declared form of a batch, and the others that were met last, `KEPT_PARAM` at most.

    Attributes:
      declared: what the step was compiled for.
      changes: what the other forms changed, one text for each that was compiled.
    """

    def __init__(self, bound: BoundSpec) -> None:
        """Resolves the declared form."""
        self.declared = BatchVariant.of(bound)
        self._bound = bound
        self._others: dict[Types, BatchVariant] = {}  # the one that was used last comes last
        self.changes: list[str] = []

    def of(self, batch: Any) -> BatchVariant:
        """Finds the form of a batch; what is no legal one is left to the declared one to refuse."""
        got, structure = jax.tree.flatten(batch)
        want, declared = jax.tree.flatten(self.declared.layout.batch)
        if structure != declared or all(map(_alike, got, want)):
            return self.declared
        types = tuple(map(_type, got))
        if types in self._others:
            self._others[types] = self._others.pop(types)
            return self._others[types]
        changes = list(_changes(self.declared.layout.batch, types))
        ranks = all(len(shape) == a.ndim for (shape, _), a in zip(types, want, strict=True))
        allowed = self._bound.spec.on_retrace == "warn" and jax.process_count() == 1
        if not changes or not ranks or not allowed:
            return self.declared
        return self._made(structure, types, changes)

    def _made(self, structure: Any, types: Types, changes: list[Problem]) -> BatchVariant:
        shapes = structure.unflatten([jax.ShapeDtypeStruct(*one) for one in types])
        try:
            with no_ambient_mesh():
                form = BatchVariant.of(
                    BoundSpec(self._bound.spec.replace(batch=shapes), self._bound.mesh)
                )
        except ShardingError:
            return self.declared
        self._others[types] = form
        if len(self._others) > KEPT:
            del self._others[next(iter(self._others))]
        self.changes.append(", ".join(f"{one.subject} {one.why}" for one in changes))
        made = 1 + len(self.changes)
        headline = f"The step is compiled for another form of its batch, which makes {made}."
        fix = 'batches of one form: pad them; or compile_step(..., on_retrace="error") to stop here'
        # The caller of the step's own method, which calls `of`, which calls this.
        warnings.warn(format_problems(headline, changes, fix), RetraceWarning, stacklevel=4)
        return form


def _alike(x: Any, abstract: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and (x.shape, x.dtype) == (
        abstract.shape,
        abstract.dtype,
    )


def _type(x: Any) -> tuple[tuple[int, ...], np.dtype]:
    return np.shape(x), jax.dtypes.canonicalize_dtype(jax.numpy.result_type(x))


def _changes(declared: Any, types: Types) -> Iterator[Problem]:
    named = leaves_by_path(declared, "batch").items()
    for (path, a), (shape, dtype) in zip(named, types, strict=True):
        parts = [
            part
            for part, before, now in (("shape", a.shape, shape), ("dtype", a.dtype, dtype))
            if before != now
        ]
        if parts:
            types_ = short_type(a.shape, a.dtype), short_type(shape, dtype)
            why = f"changed its {' and '.join(parts)}: declared as {types_[0]}, is {types_[1]}"
            yield Problem(path, why)
