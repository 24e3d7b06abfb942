"""What the loss found on one device's shards, made equal on all of them, or refused."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ..._core.errors import Problem, StepError, raise_all
from ..._core.types import Mean
from ...nn._manual_axis_rules import Axes, pvary, varying_axes
from .._objective import LossOutput


def reduce_outcome(outcome: LossOutput, rows: Axes) -> LossOutput:
    """Sums what each device found on its own rows; what is equal on all of them stays.

    Raises:
      StepError: a result differs between devices that hold the same rows.
    """
    means = {"loss": outcome.loss, **outcome.metrics}
    raise_all(
        StepError,
        "The loss on shards does not return what is equal on all of them.",
        [p for name, mean in means.items() for p in _differing(name, mean, rows)],
    )
    over: dict[Axes, list[str]] = {}
    for name, mean in means.items():
        over.setdefault(tuple(a for a in rows if a in varying_axes(mean.total)), []).append(name)
    summed: dict[str, Mean] = {}
    for axes, names in over.items():
        pairs = [means[name] for name in names]
        flat = jnp.stack([pvary(x, axes) for mean in pairs for x in (mean.total, mean.weight)])
        flat = jax.lax.psum(flat, axes) if axes else flat
        summed |= {name: Mean(flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}
    metrics = {name: summed[name] for name in outcome.metrics}
    return LossOutput(summed["loss"], metrics, outcome.model_state)


def _differing(name: str, mean: Mean, rows: Axes) -> Iterator[Problem]:
    for axis in sorted((varying_axes(mean.total) | varying_axes(mean.weight)) - set(rows)):
        fix = f"jax.lax.psum(x, {axis!r}) or pmean before it is returned"
        yield Problem(
            f"output {name!r}", f"differs per {axis!r} shard: add psum/pmean over {axis!r}", fix
        )
    for axis in sorted((varying_axes(mean.weight) - varying_axes(mean.total)) & set(rows)):
        why = f"its weight differs per {axis!r} shard, its total does not: add psum over {axis!r}"
        yield Problem(f"output {name!r}", why, f"sk.Mean(total, jax.lax.psum(weight, {axis!r}))")
