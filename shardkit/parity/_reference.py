"""The reference: the declared loss on one device, in plain JAX and plain arithmetic.

Nothing here is shared with the compiled step but the spec and the definition of its
randomness: no mesh, no lanes, no constraints, no scan. What both define is:

- the state's key k gives `init` the first half of `split(k)`; step t draws from
  `fold_in(second half, t)`, an evaluation from `fold_in(second half, 2**32 - 1)`;
- micro-batch i of n holds rows i, i+n, i+2n, …, and draws from `fold_in(key of the step, i)`;
- where gradients are kept apart by lane, the loss gets the key of the only lane there is.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core.precision import cast_floats
from .._core.split_rng import RandomDraws, per_shard_keys
from .._core.types import Loss, Mean, Variables, WithAxes
from ..step import SKIPPED, StepSpec
from ._record import (
    EVALUATE,
    GRADIENTS,
    INIT,
    LATER_STATE,
    SGD,
    Leaves,
    Record,
    Trial,
    host,
    norm,
    of_steps,
)

_EVALUATION = np.uint32(2**32 - 1)


@dataclasses.dataclass(frozen=True)
class State:
    """A training state on one device: parameters, optimizer state, model state, key."""

    params: Any
    opt_state: Any
    model_state: Any
    key: jax.Array

    def leaves(self) -> Leaves:
        """Leaves on the host, named as those of a `TrainState`."""
        parts = {
            "params": self.params,
            "opt_state": self.opt_state,
            "model_state": self.model_state,
        }
        return {path: x for name, part in parts.items() for path, x in host(part, name).items()}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A spec, run on one device.

    Attributes:
      spec: its loss, init, optimizer, precision and accumulation are used; its layout is not.
      device: where.
    """

    spec: StepSpec
    device: Any

    def start(self, key: jax.Array) -> State:
        """Makes the first state."""
        return State(*self._start(jax.device_put(key, self.device)))

    def run(self, trial: Trial, start: State, sgd: optax.GradientTransformation) -> Record:
        """Makes every observation of the certificate.

        Args:
          trial: batches and number of steps.
          start: the first state, perhaps nudged.
          sgd: optimizer of the one SGD update.
        """
        batch = trial.batch(0)
        metrics, grads, _ = self.gradients(start, batch, 0)
        sgd_params, _ = _sgd_applier(sgd)(
            grads, sgd.init(start.params), start.params, metrics["loss"]
        )
        steps, state = [], start
        for t in range(trial.steps):
            state, told = self._step(state, trial.batch(t), t)
            steps.append(told)
        return {
            **of_steps(steps),
            INIT: start.leaves(),
            GRADIENTS: host(grads),
            EVALUATE: self._evaluated(start, batch),
            SGD: host(sgd_params),
            LATER_STATE: state.leaves(),
        }

    def gradients(self, state: State, batch: Any, step: int) -> tuple[dict[str, Any], Any, Any]:
        """Returns metrics, gradients of the mean loss, and the new model state."""
        accumulate, precision = self.spec.accumulate, self.spec.precision
        n, model_state = accumulate.micro_batches, state.model_state
        key = jax.random.fold_in(state.key, step)
        by_lanes = accumulate.reduce == "end" and (n > 1 or precision.reduces_separately)
        total, weight, sums, grads = 0.0, 0.0, {}, None
        for i in range(n):
            at = jax.random.fold_in(key, i) if by_lanes or n > 1 else key
            at = per_shard_keys(at, RandomDraws(1))[0] if by_lanes else at
            rows = jax.tree.map(lambda x, i=i: x[i::n] if np.ndim(x) else x, batch)
            (part, (w, named, model_state)), g = self._part(
                state.params, model_state, self._put(rows), at
            )
            total, weight = total + float(part), weight + float(w)
            for name, (t, w) in named.items():
                so_far = sums.get(name, (0.0, 0.0))
                sums[name] = so_far[0] + float(t), so_far[1] + float(w)
            wide = jax.tree.map(_wide, g)
            grads = wide if grads is None else jax.tree.map(np.add, grads, wide)
        scale = 1 / weight if weight else 0.0
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        metrics = {name: _ratio(*pair) for name, pair in {"loss": (total, weight), **sums}.items()}
        return {**metrics, "grad_norm": np.asarray(norm(host(grads)))}, grads, model_state

    def _step(self, state: State, batch: Any, step: int) -> tuple[State, dict[str, Any]]:
        metrics, grads, model_state = self.gradients(state, batch, step)
        if self.spec.on_nonfinite != "apply":
            finite = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
            metrics[SKIPPED] = np.float32(not finite)
        params, opt_state = self._apply(grads, state.opt_state, state.params, metrics["loss"])
        return State(params, opt_state, model_state, state.key), metrics

    def _evaluated(self, state: State, batch: Any) -> dict[str, Any]:
        key = jax.random.fold_in(state.key, _EVALUATION)
        total, (weight, named, _) = self._whole(
            state.params, state.model_state, self._put(batch), key
        )
        return {n: _ratio(*pair) for n, pair in {"loss": (total, weight), **named}.items()}

    def _put(self, rows: Any) -> Any:
        return jax.device_put(rows, self.device)

    @functools.cached_property
    def _start(self) -> Any:
        spec = self.spec

        def run(key: jax.Array) -> tuple[Any, ...]:
            for_init, for_steps = jax.random.split(key)
            made = spec.init(for_init)
            made = made if isinstance(made, Variables) else Variables(made, {})
            bare = jax.tree.map(
                lambda x: x.value if isinstance(x, WithAxes) else x,
                made.params,
                is_leaf=lambda x: isinstance(x, WithAxes),
            )
            params = cast_floats(jax.tree.map(jnp.asarray, bare), spec.precision.param_dtype)
            return params, spec.optimizer.init(params), made.model_state, for_steps

        return jax.jit(run)

    @functools.cached_property
    def _part(self) -> Any:
        """`(params, model_state, rows, key) → ((total, (weight, metrics, model_state)),
        gradients)`.
        """
        loss = _plain(self.spec, evaluate=False)
        differentiated = jax.value_and_grad(loss, has_aux=True)
        compute = self.spec.precision.compute_dtype
        return jax.jit(lambda params, *args: differentiated(cast_floats(params, compute), *args))

    @functools.cached_property
    def _whole(self) -> Any:
        loss = _plain(self.spec, evaluate=True)
        compute = self.spec.precision.compute_dtype
        return jax.jit(lambda params, *args: loss(cast_floats(params, compute), *args))

    @functools.cached_property
    def _apply(self) -> Any:
        return _applier(self.spec.optimizer)


def _applier(optimizer: optax.GradientTransformation) -> Any:
    update = optax.with_extra_args_support(optimizer).update

    def apply(grads: Any, opt_state: Any, params: Any, loss: Any) -> tuple[Any, Any]:
        updates, opt_state = update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(apply)


@functools.lru_cache(maxsize=8)
def _sgd_applier(sgd: optax.GradientTransformation) -> Any:
    """The same for an optimizer that several runs share: compiled once."""
    return _applier(sgd)


def _plain(spec: StepSpec, *, evaluate: bool) -> Any:
    """The user's loss as `(params, model_state, batch, key) → (total, (weight, metrics, model_state))`."""
    loss = spec.loss_fn
    loss = loss if isinstance(loss, Loss) else Loss(loss, loss)
    call = loss.evaluate if evaluate else loss.train

    def run(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        if loss.stateful:
            value, metrics, model_state = call(params, batch, key, model_state)
        else:
            value = call(params, batch, key)
            value, metrics = value if isinstance(value, tuple) else (value, {})
        total, weight = _pair(value)
        return total, (weight, {name: _pair(m) for name, m in metrics.items()}, model_state)

    return run


def _pair(value: Any) -> tuple[Any, Any]:
    total, weight = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)


def _wide(x: jax.Array) -> np.ndarray:
    """Micro-batches are summed in f32 at least, whatever the compute dtype; on the host."""
    return np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _ratio(total: Any, weight: Any) -> np.ndarray:
    return np.asarray(float(total) / float(weight) if float(weight) else 0.0, np.float32)


def nudged(state: State, dtype: Any, seed: int) -> State:
    """Moves every parameter up or down by one rounding of `dtype`, at random.

    What the results then change by is what correct programs may differ by: programs that sum in
    another order differ by roundings too.
    """
    rng, eps = np.random.default_rng(seed), float(jnp.finfo(dtype).eps)

    def move(x: jax.Array) -> jax.Array:
        signs = rng.choice([-1.0, 1.0], size=x.shape)
        moved = np.asarray(x).astype(np.float64) * (1 + eps * signs)
        return jax.device_put(moved.astype(x.dtype), x.sharding)

    return dataclasses.replace(state, params=jax.tree.map(move, state.params))
