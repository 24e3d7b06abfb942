"""Layers in a pipeline, whose results are those on all rows: sums are added up, means averaged.

A pipeline calls the three parts of `sk.nn.layer_stack` on micro-batches of a device's rows. Of the
numbers that the last part returns it averages scalars and adds up both sides of an `sk.Mean`,
whatever they are. What is outside of the call has all rows, so the call is followed by itself.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from .._core.errors import Problem, ShardkitError, StepError, raise_all
from .._core.partition import Partition
from .._core.row_dims import count_rows
from .._core.tree import list_leaves
from .._core.types import Batch, Key, Mean, PyTree, Scalar
from ..nn._overridable import Override, StepContext
from ._objective import LossOutput
from .rows import check_rows, derive_solves_alike, has_own_derivatives

_WHOLE = "the same before or after sk.nn.layer_stack, where all rows are together"


@final
@dataclasses.dataclass(frozen=True)
class CheckedStages(Override):
    """Overrides a layer stack by another override, and checks that this may split its rows."""

    axis: str  # of the mesh, that of `inner`
    inner: Override  # what computes the stack on micro-batches
    splits: str  # it in code, for errors: `"strategies.pipeline()"`

    def __call__(
        self,
        around: StepContext,
        plain: Callable[..., Any],
        first: Any,
        layer: Any,
        last: Any,
        **arrays: PyTree,
    ) -> Any:
        """Returns what `sk.nn.layer_stack` does on all rows.

        Raises:
          StepError: what mixes rows of several micro-batches, with its line.
        """

        def stack(params: PyTree, batch: Batch, key: Key | None) -> Any:
            outer_params, layers = params
            given = {"outer_params": outer_params, "layers": layers, "batch": batch, "key": key}
            return plain(first, layer, last, **given)

        fixed = [axis for axis in around.row_axes if axis not in around.moving_row_axes]
        parts = self.inner.row_parts * math.prod(around.mesh.shape[axis] for axis in fixed)
        self._check_sizes(arrays["batch"])
        try:
            out = self.inner(around, plain, first, layer, last, **arrays)
        except ShardkitError:
            raise
        except Exception:  # a user's code: on fewer rows than it is written for?
            self._follow(stack, arrays, parts)
            raise
        powers = self._follow(stack, arrays, parts)

        def scale(name: str, x: Scalar, added: int) -> Scalar:
            power = powers.get(name, 0) - added
            return x * float(parts) ** power if power else x

        def of_all_rows(name: str, x: Any) -> Any:
            if not isinstance(x, Mean):
                return scale(name, x, 0)
            return Mean(scale(name, x.total, 1), scale(_weight_of(name), x.weight, 1))

        if not isinstance(out, tuple):
            return of_all_rows("loss", out)
        loss, metrics = out
        return of_all_rows("loss", loss), {k: of_all_rows(k, x) for k, x in metrics.items()}

    def _follow(
        self, stack: Callable[..., Any], arrays: Mapping[str, PyTree], parts: int
    ) -> dict[str, int]:
        """The power of the rows with which each number that the stack returns grows."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), dict(arrays))
        batch, params = shapes["batch"], (shapes["outer_params"], shapes["layers"])
        dims = tuple(0 if x.shape else None for x in jax.tree.leaves(batch))
        rows = count_rows(batch, dims)
        if not rows:
            return {}
        has_key = shapes["key"] is not None

        def objective(params: PyTree, _: Any, batch: Batch, key: Key) -> tuple[Scalar, LossOutput]:
            numbers = _numbers(stack(params, batch, key if has_key else None))
            means = {name: Mean(x, jnp.ones(())) for name, x in numbers.items()}
            return numbers["loss"], LossOutput(means.pop("loss"), means, {})

        key = shapes["key"] if has_key else jax.eval_shape(lambda: jax.random.key(0))
        args = params, {}, batch, key
        program = jax.make_jaxpr(objective)(*args).jaxpr
        # whole numbers, and keys
        fixed = (x.path for x in list_leaves(params) if not jnp.issubdtype(x.dtype, jnp.inexact))
        return check_rows(
            derive_solves_alike(objective, program),
            args,
            dims,
            self.splits,
            partition=Partition(frozenset(fixed)),
            part=rows.pop() // parts,
            whole=_WHOLE,
            adds=True,
            own_derivatives=has_own_derivatives(program),
        )

    def _check_sizes(self, batch: Batch) -> None:
        leaves = [leaf.within("batch") for leaf in list_leaves(batch) if leaf.shape]
        sizes = [leaf.shape[0] for leaf in leaves]
        usual = max(sizes, key=lambda n: (sizes.count(n), n), default=0)
        why = f"has another size on dim 0 than {usual} rows, and {self.splits} splits dim 0"
        fix = "what counts no rows in outer_params, or closed over by first, layer or last"
        problems = [
            Problem(f"sk.nn.layer_stack(batch=...): {leaf}", why, fix)
            for leaf in leaves
            if leaf.shape[0] != usual
        ]
        raise_all(StepError, "The rows of the batch cannot be split.", problems)


def _weight_of(name: str) -> str:
    return f"{name}.weight"


def _numbers(out: Any) -> dict[str, Scalar]:
    """All numbers that a stack returns, by name: the loss or its total as `"loss"`."""
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    numbers: dict[str, Scalar] = {}
    for name, x in {"loss": loss, **metrics}.items():
        numbers[name] = x.total if isinstance(x, Mean) else x
        if isinstance(x, Mean):
            numbers[_weight_of(name)] = x.weight
    return {name: jnp.asarray(x) for name, x in numbers.items()}
