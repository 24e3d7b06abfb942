"""Skips an update on the devices if the loss or a gradient is not finite.

The check reads two scalars that the step computes anyway and selects between two states, so it
needs no extra collective, and the host can dispatch the next step without reading the result.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._core.errors import Problem, format_problems
from .._core.tracing import SETTINGS
from .._core.train_state import TrainState
from .._core.tree import leaves_by_path
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


def run_checked(compiled: jax.stages.Compiled, *args: PyTree) -> Any:
    """Runs a program of `(state, batch)`.

    `jax_debug_nans` and `jax_debug_infs` are checked here: JAX does not check compiled programs of
    several devices after their first call, and gives no leaf. They raise FloatingPointError.
    """
    nans, infs = SETTINGS.jax_debug_nans, SETTINGS.jax_debug_infs
    if not (nans or infs):
        return compiled(*args)
    with jax.debug_nans(False), jax.debug_infs(False):
        results = compiled(*args)
        bad = [
            path.partition("/")[2]
            for path, x in leaves_by_path(results).items()
            if jnp.issubdtype(x.dtype, jnp.inexact)
            and ((nans and jnp.isnan(x).any()) or (infs and jnp.isinf(x).any()))
        ]
    if not bad:
        return results
    what = " or ".join(name for name, on in (("NaN", nans), ("infinity", infs)) if on)
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    problem = Problem(shown, f"{what}, at which JAX is set to raise")
    fix = 'on_nonfinite="stop", and sk.replay("runs/NAME", step), which names the operation'
    raise FloatingPointError(format_problems("A step computed what is not finite.", [problem], fix))
