"""What a compiled step does with an update whose loss or gradients are not finite.

The verdict is made on the devices from two numbers that the step has anyway, and carried out by a
select, so it costs no collective and the host need not look before the next step is dispatched.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._core.train_state import TrainState

OnNonfinite = Literal["apply", "skip", "stop"]
ON_NONFINITE: tuple[OnNonfinite, ...] = ("apply", "skip", "stop")
SKIPPED = "skipped"


def is_usable(metrics: dict[str, jax.Array]) -> jax.Array:
    """Whether the update of a step is finite: bool[].

    The norm is finite only where every gradient is, since squares cannot cancel. Squares overflow
    where the norm is above 1.8e19, which is no better.
    """
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def chosen(
    usable: jax.Array, after: TrainState, before: TrainState, how: OnNonfinite
) -> TrainState:
    """The state after an update or, bit for bit but for its counter, the one before it.

    Skipping counts the step, whose batch is not seen again. Stopping marks the state as halted:
    later steps find that and change nothing, so whoever learns of it, however late, has the
    state that the step failed on.
    """
    halted = before.halted | ~usable if how == "stop" else before.halted
    made = usable & ~halted

    def select(new: Any, old: Any, when: jax.Array = made) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(when, a, b), new, old)

    return TrainState(
        select(after.step, before.step, ~halted),
        select(after.params, before.params),
        select(after.opt_state, before.opt_state),
        select(after.model_state, before.model_state),
        after.key,
        halted,
    )
