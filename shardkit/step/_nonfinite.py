"""What a compiled step does with an update whose loss or gradients are not finite.

The verdict is made on the devices from two numbers that the step has anyway, and carried out by a
select, so it costs no collective and the host need not look before the next step is dispatched.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..state import TrainState

OnNonfinite = Literal["apply", "skip", "stop"]
ON_NONFINITE: tuple[OnNonfinite, ...] = ("apply", "skip", "stop")
SKIPPED = "skipped"


def is_usable(state: TrainState, metrics: dict[str, jax.Array]) -> jax.Array:
    """Whether the update of a step is to be made: bool[].

    The norm is finite only where every gradient is, since squares cannot cancel. Squares overflow
    where the norm is above 1.8e19, which is no better.
    """
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    return finite & (state.step >= 0)


def chosen(
    usable: jax.Array, after: TrainState, before: TrainState, how: OnNonfinite
) -> TrainState:
    """The state after an update or, bit for bit but for its counter, the one before it.

    Skipping counts the step, whose batch is not seen again. Stopping turns the counter into its
    complement, which is negative: later steps find that and change nothing, so whoever learns
    of it, however late, has the state that the step failed on.
    """

    def select(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)

    stopped = jnp.where(before.step < 0, before.step, ~before.step)
    return TrainState(
        after.step if how == "skip" else jnp.where(usable, after.step, stopped),
        select(after.params, before.params),
        select(after.opt_state, before.opt_state),
        select(after.extra, before.extra),
        after.key,
    )


def released(state: TrainState) -> TrainState:
    """The state that a stopped step failed on, its counter as it was before that step.

    Args:
      state: as a step with `on_nonfinite="stop"` returned it; one that has not stopped stays.
    """
    step = jnp.where(state.step < 0, ~state.step, state.step)
    return TrainState(step, state.params, state.opt_state, state.extra, state.key)
