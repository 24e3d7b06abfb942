"""Reduces the loss and metrics of one device's shards to equal values on all devices."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from ..._core.errors import Problem, StepError, raise_all
from ..._core.tree import leaves_by_path
from ..._core.types import Mean, PyTree
from ...nn._manual_axis_rules import Axes, pvary, varying_axes
from .._objective import LossOutput


def reduce_output(
    output: LossOutput, rows: Axes, model_state: PyTree, equal_state: Sequence[bool]
) -> LossOutput:
    """Sums one device's loss and metrics over those of the rows; values equal on all devices stay.

    `model_state` is what the loss was called with; `equal_state` says for each leaf of the new one
    whether all devices of the rows compute the same. Raises StepError if a result varies over an
    axis that does not split the rows, and needs a psum there; or new state varies over any.
    """
    leaves, structure = jax.tree.flatten(output.model_state)
    new_state = structure.unflatten(
        _typed_equal(x, rows) if equal else x for x, equal in zip(leaves, equal_state, strict=True)
    )
    means = {"loss": output.loss, **output.metrics}
    problems = [p for name, mean in means.items() for p in _varying_problems(name, mean, rows)]
    problems += _state_problems(model_state, new_state)
    headline = "The loss on shards returns values that differ between devices with the same rows."
    raise_all(StepError, headline, problems)
    names_by_axes: dict[Axes, list[str]] = {}
    for name, mean in means.items():
        axes = tuple(axis for axis in rows if axis in varying_axes(mean.total))
        names_by_axes.setdefault(axes, []).append(name)
    summed: dict[str, Mean] = {}
    for axes, names in names_by_axes.items():
        # One collective for [total, weight, total, weight, …].
        scalars = [x for name in names for x in (means[name].total, means[name].weight)]
        flat = jnp.stack([pvary(x, axes) for x in scalars])
        flat = jax.lax.psum(flat, axes) if axes else flat
        sums = [flat[i].astype(like.dtype) for i, like in enumerate(scalars)]
        pairs = zip(names, sums[::2], sums[1::2], strict=True)
        summed |= {name: Mean(total, weight) for name, total, weight in pairs}
    metrics = {name: summed[name] for name in output.metrics}
    return LossOutput(summed["loss"], metrics, new_state)


def _typed_equal(x: jax.Array, rows: Axes) -> jax.Array:
    """Types equal numbers as equal; those made of parameters have the type of their gradients."""
    axes = tuple(axis for axis in rows if axis in varying_axes(x))
    return jax.lax.pmax(x, axes) if axes else x


def _state_problems(before: PyTree, after: PyTree) -> Iterator[Problem]:
    old, new = (leaves_by_path(tree, "model_state") for tree in (before, after))
    for path, x in new.items():
        axes = varying_axes(x) - (varying_axes(old[path]) if path in old else frozenset())
        for axis in sorted(axes):
            fix = f'jax.lax.pmean(x, {axis!r}) of it; or nn.BatchNorm(..., axis_name="batch")'
            yield Problem(path, f"differs per {axis!r} shard: add pmean over {axis!r}", fix)


def _varying_problems(name: str, mean: Mean, rows: Axes) -> Iterator[Problem]:
    for axis in sorted((varying_axes(mean.total) | varying_axes(mean.weight)) - set(rows)):
        fix = f"jax.lax.psum(x, {axis!r}) or pmean before it is returned"
        why = f"differs per {axis!r} shard: add psum/pmean over {axis!r}"
        yield Problem(f"output {name!r}", why, fix)
    for axis in sorted((varying_axes(mean.weight) - varying_axes(mean.total)) & set(rows)):
        why = f"its weight differs per {axis!r} shard, its total does not: add psum over {axis!r}"
        yield Problem(f"output {name!r}", why, f"sk.Mean(total, jax.lax.psum(weight, {axis!r}))")
