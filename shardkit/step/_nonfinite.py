"""Skips an update on the devices if the loss or a gradient is not finite.

The check reads two scalars that the step computes anyway and selects between two states, so it
needs no extra collective, and the host can dispatch the next step without reading the result.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from .._core.train_state import TrainState
from .._core.types import PyTree, Scalar

OnNonfinite = Literal["apply", "skip", "stop"]
ON_NONFINITE: tuple[OnNonfinite, ...] = ("apply", "skip", "stop")
SKIPPED = "skipped"


def is_finite_update(metrics: dict[str, Scalar]) -> Scalar:
    """Whether the loss and all gradients are finite: bool[].

    The norm is finite only if every gradient is, since squares do not cancel. Squares overflow for
    norms above 1.8e19; such an update is skipped too.
    """
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def select_state(
    is_finite: Scalar, after: TrainState, before: TrainState, on_nonfinite: OnNonfinite
) -> TrainState:
    """The state after an update, or the one before it, bit for bit but for its counter.

    `"skip"` counts the step, since its batch is not used again. `"stop"` sets `halted`: later steps
    then change nothing, so the host gets the state that the step failed on, however late it looks.
    """
    halted = before.halted | ~is_finite if on_nonfinite == "stop" else before.halted
    update = is_finite & ~halted

    def select(new: PyTree, old: PyTree, when: Scalar = update) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(when, a, b), new, old)

    return TrainState(
        step=select(after.step, before.step, ~halted),
        params=select(after.params, before.params),
        opt_state=select(after.opt_state, before.opt_state),
        model_state=select(after.model_state, before.model_state),
        key=after.key,
        halted=halted,
    )
