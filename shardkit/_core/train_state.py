"""`TrainState`: everything a training step reads and replaces."""

import dataclasses

import jax

from .types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree that the step consumes (donated) and returns.

    Attributes:
      step: i32[], number of updates so far.
      params: pytree of arrays, in the precision's `param_dtype` if it has one.
      opt_state: state of the optax chain.
      model_state: mutable model state (batch statistics), `{}` for models without any.
      key: typed PRNG key[], which does not change: the key of step t is `fold_in(key, t)`, so a
        resumed run draws what an uninterrupted one would have drawn.
      halted: bool[], whether an update with `on_nonfinite="stop"` was not finite. That update and
        all later ones are skipped: the other fields are those before it.
    """

    # A tree of shardings or of shapes has the same form, so the leaves are not typed as arrays.
    step: PyTree
    params: Params
    opt_state: PyTree
    model_state: PyTree
    key: PyTree
    halted: PyTree
