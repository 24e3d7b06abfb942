"""The reference: the declared loss on one device, in plain JAX and plain arithmetic.

It shares nothing with the compiled step but the spec, how an optimizer is called, and the
definition of its randomness: no mesh, no gradient shards, no constraints, no scan. Both define:

- the state's key k gives `init` the first half of `split(k)`; step t draws from
  `fold_in(second half, t)`, an evaluation from `fold_in(second half, 2**32 - 1)`;
- micro-batch i of n holds rows i, i+n, i+2n, …, and draws from `fold_in(key of the step, i)`;
- if gradients are accumulated per shard, the loss gets the key of the only shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from .._core.precision import cast_floats
from .._core.split_rng import RandomDraws, per_shard_keys
from .._core.types import (
    Batch,
    Key,
    Loss,
    Mean,
    Params,
    PyTree,
    Scalar,
    Variables,
    WithAxes,
)
from ..step import SKIPPED, StepSpec, call_update
from ._record import (
    COUNTERS,
    EVALUATE,
    GRADIENTS,
    INIT,
    LATER_EVALUATE,
    LATER_STATE,
    SGD,
    ParityInputs,
    Record,
    copy_state_to_host,
    copy_to_host,
    global_norm,
    group_metrics_by_check,
    select_counters,
)

_EVALUATION = np.uint32(2**32 - 1)

HostMetrics = dict[str, Any]
"""`{name: f32[] on the host}`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReferenceState:
    """A training state on one device; `key` is the one that the steps draw from."""

    params: Params
    opt_state: PyTree
    model_state: PyTree
    key: Key


@dataclasses.dataclass(frozen=True)
class Reference:
    """A spec, run on one device.

    Attributes:
      spec: its loss, init, optimizer, precision and accumulation are used; its layout is not.
      device: that all arrays are on.
    """

    spec: StepSpec
    device: Any

    def init(self, key: Key) -> ReferenceState:
        """Makes the first state."""
        return ReferenceState(*self._init(jax.device_put(key, self.device)))

    def run(
        self, inputs: ParityInputs, start: ReferenceState, sgd: optax.GradientTransformation
    ) -> Record:
        """Records every check of the parity report.

        Args:
          inputs: batches and number of steps.
          start: the first state, perhaps nudged.
          sgd: optimizer of the one SGD update.
        """
        batch = inputs.batch(0)
        metrics, grads, _ = self.gradients(start, batch, 0)
        sgd_params = _jit_sgd_update(sgd)(grads, sgd.init(start.params), start.params)
        all_metrics, state = [], start
        for t in range(inputs.steps):
            state, metrics = self._step(state, inputs.batch(t), t)
            all_metrics.append(metrics)
        after = copy_state_to_host(state)
        own = {"step": np.int32(inputs.steps), "halted": np.bool_(False), "key": state.key}
        return {
            **group_metrics_by_check(all_metrics),
            INIT: copy_state_to_host(start),
            GRADIENTS: copy_to_host(grads),
            EVALUATE: self._evaluate(start, batch),
            SGD: copy_to_host(sgd_params),
            LATER_STATE: after,
            LATER_EVALUATE: self._evaluate(state, batch),
            COUNTERS: {**copy_to_host(own), **select_counters(after)},
        }

    def gradients(
        self, state: ReferenceState, batch: Batch, step: int
    ) -> tuple[HostMetrics, Params, PyTree]:
        """Returns metrics, gradients of the mean loss, and the new model state."""
        model_state = state.model_state
        sums: dict[str, np.ndarray] = {}  # f64[2] each: total and weight, over micro-batches
        grads = None
        for rows, key in self._micro_batches(batch, jax.random.fold_in(state.key, step)):
            (total, (weight, metrics, model_state)), micro_grads = self._loss_and_grads(
                state.params, model_state, self._to_device(rows), key
            )
            for name, pair in {"loss": (total, weight), **metrics}.items():
                sums[name] = sums.get(name, np.zeros(2)) + np.array([float(x) for x in pair])
            micro_grads = jax.tree.map(_to_f32, micro_grads)
            grads = micro_grads if grads is None else jax.tree.map(np.add, grads, micro_grads)
        weight = float(sums["loss"][1])
        scale = 1 / weight if weight else 0.0
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        means = {name: _divide(total, weight) for name, (total, weight) in sums.items()}
        means["grad_norm"] = np.asarray(global_norm(copy_to_host(grads)))
        return means, grads, model_state

    def _micro_batches(self, batch: Batch, step_key: Key) -> Iterator[tuple[Batch, Key]]:
        """Yields the rows of each micro-batch and the key that its loss gets."""
        accumulate, precision = self.spec.accumulate, self.spec.precision
        n = accumulate.micro_batches
        per_shard = accumulate.reduce == "end" and (n > 1 or precision.reduces_separately)
        for i in range(n):
            key = jax.random.fold_in(step_key, i) if per_shard or n > 1 else step_key
            key = per_shard_keys(key, RandomDraws(1))[0] if per_shard else key
            # With n=2 micro-batches of 6 rows: rows 0 2 4, then rows 1 3 5.
            yield jax.tree.map(lambda x, i=i: x[i::n] if np.ndim(x) else x, batch), key

    def _step(
        self, state: ReferenceState, batch: Batch, step: int
    ) -> tuple[ReferenceState, HostMetrics]:
        metrics, grads, model_state = self.gradients(state, batch, step)
        if self.spec.on_nonfinite != "apply":
            finite = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
            metrics[SKIPPED] = np.float32(not finite)
        params, opt_state = self._update(
            grads, metrics["loss"], state, self._to_device(batch), np.uint32(step)
        )
        return ReferenceState(params, opt_state, model_state, state.key), metrics

    def _evaluate(self, state: ReferenceState, batch: Batch) -> HostMetrics:
        key = jax.random.fold_in(state.key, _EVALUATION)
        total, (weight, metrics, _) = self._eval_loss(
            state.params, state.model_state, self._to_device(batch), key
        )
        sums = {"loss": (total, weight), **metrics}
        return {name: _divide(total, weight) for name, (total, weight) in sums.items()}

    def _to_device(self, rows: Batch) -> Batch:
        return jax.device_put(rows, self.device)

    @functools.cached_property
    def _init(self) -> Callable[[Key], tuple[Any, ...]]:
        spec = self.spec

        def run(key: Key) -> tuple[Any, ...]:
            init_key, steps_key = jax.random.split(key)
            variables = spec.init(init_key)
            if not isinstance(variables, Variables):
                variables = Variables(variables, {})
            params = jax.tree.map(
                lambda x: jnp.asarray(x.value if isinstance(x, WithAxes) else x),
                variables.params,
                is_leaf=lambda x: isinstance(x, WithAxes),
            )
            params = cast_floats(params, spec.precision.param_dtype)
            return params, spec.optimizer.init(params), variables.model_state, steps_key

        return jax.jit(run)

    @functools.cached_property
    def _loss_and_grads(self) -> Callable[..., Any]:
        """`(params, model_state, rows, key) → ((total, (weight, metrics, model_state)), grads)`."""
        value_and_grad = jax.value_and_grad(_build_plain_loss(self.spec, train=True), has_aux=True)
        compute = self.spec.precision.compute_dtype
        return jax.jit(lambda params, *args: value_and_grad(cast_floats(params, compute), *args))

    @functools.cached_property
    def _eval_loss(self) -> Callable[..., Any]:
        """`(params, model_state, batch, key) → (total, (weight, metrics, model_state))`."""
        loss = _build_plain_loss(self.spec, train=False)
        compute = self.spec.precision.compute_dtype
        return jax.jit(lambda params, *args: loss(cast_floats(params, compute), *args))

    @functools.cached_property
    def _update(self) -> Callable[..., tuple[Params, PyTree]]:
        """`(grads, loss, state, batch, step) → (params, opt_state)`."""

        def apply(
            grads: Params, loss: Scalar, state: ReferenceState, batch: Batch, step: Any
        ) -> tuple[Params, PyTree]:
            def value_and_grad(params: Params) -> tuple[Scalar, Params]:
                key = jax.random.fold_in(state.key, step)
                return self._mean_and_grads(params, state.model_state, batch, key)

            updates, opt_state = call_update(
                self.spec.optimizer,
                grads,
                state.opt_state,
                state.params,
                loss,
                value_and_grad=value_and_grad,
            )
            return optax.apply_updates(state.params, updates), opt_state

        return jax.jit(apply)

    def _mean_and_grads(
        self, params: Params, model_state: PyTree, batch: Batch, step_key: Key
    ) -> tuple[Scalar, Params]:
        """Loss and gradient of other parameters, while it is traced: for optimizers that ask."""
        total, weight, grads = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        for rows, key in self._micro_batches(batch, step_key):
            (value, (n, _, model_state)), micro = self._loss_and_grads(
                params, model_state, rows, key
            )
            total, weight = total + value, weight + n
            grads = jax.tree.map(lambda x, y: x + y.astype(x.dtype), grads, micro)
        return total / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)


@functools.lru_cache(maxsize=8)
def _jit_sgd_update(sgd: optax.GradientTransformation) -> Callable[..., Params]:
    """`(grads, opt_state, params) → params`, compiled once for all runs that share `sgd`."""

    def apply(grads: Params, opt_state: PyTree, params: Params) -> Params:
        return optax.apply_updates(params, sgd.update(grads, opt_state, params)[0])

    return jax.jit(apply)


def _build_plain_loss(spec: StepSpec, *, train: bool) -> Callable[..., Any]:
    """The user's loss: `(params, model_state, batch, key) → (total, (weight, metrics, state))`.

    `metrics` is `{name: (total, weight)}`, `state` the new model state.
    """
    loss = spec.loss_fn
    loss = loss if isinstance(loss, Loss) else Loss(loss, loss)
    call = loss.train if train else loss.evaluate

    def run(params: Params, model_state: PyTree, batch: Batch, key: Key) -> tuple[Any, Any]:
        if loss.stateful:
            value, metrics, model_state = call(params, batch, key, model_state)
        else:
            value = call(params, batch, key)
            value, metrics = value if isinstance(value, tuple) else (value, {})
        total, weight = _split_mean(value)
        return total, (weight, {name: _split_mean(m) for name, m in metrics.items()}, model_state)

    return run


def _split_mean(value: Any) -> tuple[jax.Array, jax.Array]:
    """Total and weight, f32[] each; a plain number has weight 1."""
    total, weight = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)


def _to_f32(x: jax.Array) -> np.ndarray:
    """To the host in f32 or wider: micro-batches are summed in at least f32."""
    return np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _divide(total: Any, weight: Any) -> np.ndarray:
    """f32[]: the mean; 0 if the weight is 0."""
    return np.asarray(float(total) / float(weight) if float(weight) else 0.0, np.float32)


def nudge_params(state: ReferenceState, dtype: DTypeLike, seed: int) -> ReferenceState:
    """Moves every parameter up or down by one rounding of `dtype`, at random.

    The change of the results is the noise of the reference: programs that sum in another order
    differ by roundings too, so correct programs differ by about as much. In f32, a parameter of
    0.5 becomes 0.5 ± 6e-8.
    """
    rng, eps = np.random.default_rng(seed), float(jnp.finfo(dtype).eps)

    def nudge(x: jax.Array) -> jax.Array:
        signs = rng.choice([-1.0, 1.0], size=x.shape)
        nudged = np.asarray(x).astype(np.float64) * (1 + eps * signs)
        return jax.device_put(nudged.astype(x.dtype), x.sharding)

    return dataclasses.replace(state, params=jax.tree.map(nudge, state.params))
