"""`TrainState`: everything a training step reads and replaces."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree that the step consumes (donated) and returns.

    Attributes:
      step: i32[], number of updates made.
      params: pytree of arrays in the precision's parameter dtype.
      opt_state: state of the optax chain.
      model_state: mutable model state (batch statistics), `{}` for models that have none.
      key: typed PRNG key[], never advanced: the key of step t is `fold_in(key, t)`, so a
        resumed run draws what an uninterrupted one would have drawn.
      halted: bool[], an update with `on_nonfinite="stop"` was not finite, so neither it nor any
        later one was made: everything else is what that update began with.
    """

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    key: Any
    halted: Any
