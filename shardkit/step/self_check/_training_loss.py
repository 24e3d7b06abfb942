"""The training loss alone: what the compiled gradient is held to.

It is a program of its own: no differentiation, no remat, no gradient shards, no `vmap`, no
reduction of gradients, and its own reading of what the loss returns, so a fault in any of them is
not in both. It shares the model with the gradient, with what the strategy computes in place of its
marked parts, and the definition of the randomness: the key of step t is `fold_in(state.key, t)`,
micro-batch i of n has rows i, i+n, i+2n, … and draws from `fold_in(key of the step, i)`. Without
the same dropout masks a difference quotient means nothing, which is why `evaluate` (another key,
perhaps another form of the loss) cannot be used.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..._core.precision import widen
from ..._core.row_dims import RowDims, map_rows, with_dim
from ..._core.split_rng import RandomDraws, per_shard_keys
from ..._core.train_state import TrainState
from ..._core.types import Batch, Key, Loss, Mean, PyTree, Scalar
from .._compile import CompiledProgram
from .._layout import StepLayout
from .._objective import LossOutput, Objective
from .._unbound_axes import bind_batch_axes

Totals = tuple[Scalar, Scalar]


@dataclasses.dataclass(frozen=True)
class LossProgram:
    """The compiled training loss."""

    program: CompiledProgram  # `(state, batch) → (total, weight)`
    policy: str | None  # the dtype policy by which it sees the parameters; see `policy_dtype`
    lowest: str  # of the dtypes in which it sees them, the one with the largest roundings

    @classmethod
    def of(
        cls, compiled: Callable[[str | None], CompiledProgram], policy: str | None, lowest: str
    ) -> "LossProgram":
        """Compiles the loss in f32 where the step computes in less, if the model can.

        A bf16 loss moves in steps: along one direction of a small decoder its difference quotient
        was off by 0.1 to 0.6 of the scale at the best step, in f32 by the gradient's own error.
        """
        if jnp.finfo(lowest).bits < 32:
            try:
                return cls(compiled("float32"), "float32", "float32")
            except (TypeError, ValueError, NotImplementedError):
                # A batch in bf16 beside a convolution, a kernel for bf16 alone: as declared, then.
                pass
        return cls(compiled(policy), policy, lowest)


def build_plain_objective(loss_fn: Callable[..., Any]) -> Objective:
    """Wraps a user's loss as `(params, model_state, batch, key) → (total, LossOutput)`.

    No metrics; a plain scalar has weight 1.
    """
    loss = loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn, loss_fn)
    call = bind_batch_axes(loss.train, None)

    def run(params: Any, model_state: Any, batch: Batch, key: Key) -> tuple[Scalar, LossOutput]:
        if loss.stateful:
            value, _, model_state = call(params, batch, key, model_state)
        else:
            value = call(params, batch, key)
            value = value[0] if isinstance(value, tuple) else value
        pair = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
        total, weight = (widen(jnp.asarray(x)) for x in pair)
        return total, LossOutput(Mean(total, weight), {}, model_state)

    return run


def build_training_loss(
    objective: Objective,
    compute: Callable[[Any], Any],
    layout: StepLayout,
    steps: int,
    *,
    per_shard: bool,
) -> Callable[[TrainState, Batch], Totals]:
    """Builds `(state, batch) → (total, weight)`, f32[] or f64[], over all micro-batches: `steps`.

    `objective` is of one of them; `compute` casts the parameters as it sees them. Gradients are
    kept apart (`per_shard`) by a loss that does not split its key itself.
    """

    def key_of(key: Key, index: Any) -> Key:
        if steps > 1:
            key = jax.random.fold_in(key, index)
        # Gradient shards draw parts of what this key draws for all rows.
        return per_shard_keys(key, RandomDraws(1))[0] if per_shard else key

    def run(state: TrainState, batch: Batch) -> Totals:
        params, key = compute(state.params), jax.random.fold_in(state.key, state.step)

        def loss_of(model_state: Any, index: Any) -> tuple[Totals, Any]:
            rows = _take_rows(batch, layout.row_dims, layout.batch_shardings, steps, index)
            total, output = objective(params, model_state, rows, key_of(key, index))
            return (total, output.loss.weight), output.model_state

        def body(carry: tuple[Totals, Any], index: jax.Array) -> tuple[Any, None]:
            (total, weight), model_state = carry
            (part, more), model_state = loss_of(model_state, index)
            return ((total + part, weight + more), model_state), None

        if steps == 1:
            return loss_of(state.model_state, jnp.int32(0))[0]
        like, _ = jax.eval_shape(loss_of, state.model_state, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        (totals, _), _ = jax.lax.scan(body, (zeros, state.model_state), jnp.arange(steps))
        return totals

    return run


def _take_rows(
    batch: Batch, dims: RowDims, shardings: PyTree, steps: int, index: jax.Array
) -> Batch:
    """Rows `index, index + steps, …`: `[rows, …] → [rows/steps, steps, …]`, column `index`."""

    def take(x: jax.Array, dim: int, sharding: NamedSharding) -> jax.Array:
        entries = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
        columns = jax.lax.with_sharding_constraint(
            x.reshape(with_dim(x.shape, dim, x.shape[dim] // steps, steps)),
            NamedSharding(
                sharding.mesh, PartitionSpec(*with_dim(entries, dim, entries[dim], None))
            ),
        )
        return jax.lax.dynamic_index_in_dim(columns, index, dim + 1, keepdims=False)

    return map_rows(take, batch, dims, shardings) if steps > 1 else batch
