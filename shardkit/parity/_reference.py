"""The reference: the declared loss on one device, in plain JAX and plain arithmetic.

It shares nothing with the compiled step but the spec, how an optimizer is called, and the
definition of its randomness: no mesh, no gradient shards, no constraints (the model's own are
removed), no scan. Both define:

- `init` gets the key k; with s = `fold_in(k, 2**32 - 2)`, step t draws from
  `fold_in(s, t)`, an evaluation from `fold_in(s, 2**32 - 1)`;
- micro-batch i of n holds rows i, i+n, i+2n, …, and draws from `fold_in(key of the step, i)`;
- if gradients are accumulated per shard, the loss gets the key of the only shard.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from .._core.errors import VerificationError, first_line
from .._core.own_sharding import on_any_mesh, without_constraints
from .._core.partition import Partition
from .._core.precision import cast_floats
from .._core.row_dims import RowDims, map_rows, take_rows
from .._core.split_rng import RandomDraws, per_shard_keys
from .._core.tree import list_leaves
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
from ..step import (
    SKIPPED,
    StepSpec,
    call_update,
    find_partition,
    list_row_dims,
    no_ambient_mesh,
)
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
from ._row_powers import RowPowers

_EVALUATION, _STEPS = np.uint32(2**32 - 1), np.uint32(2**32 - 2)

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
      row_dims: the dim of each leaf of a batch that counts rows, as a layout says it; by default
        as the spec says it without one.
    """

    spec: StepSpec
    device: Any
    row_dims: RowDims | None = None

    def init(self, key: Key) -> ReferenceState:
        """Makes the first state."""
        return ReferenceState(*self._init(jax.device_put(key, self.device)))

    def run(
        self,
        inputs: ParityInputs,
        start: ReferenceState,
        sgd: optax.GradientTransformation,
        nudge: Callable[[Params], Params] | None = None,
    ) -> Record:
        """Records every check of the parity report, from a first state that is perhaps nudged.

        `nudge` is applied to the gradients of each step.
        """
        batch = inputs.batch(0)
        _, grads, _ = self.gradients(start, batch, 0, nudge)
        trained = self._trained(start.params)
        sgd_params = _jit_sgd_update(sgd)(grads, sgd.init(trained), trained)
        sgd_params = self._partition(start.params).merge(sgd_params, start.params)
        all_metrics, state = [], start
        for t in range(inputs.steps):
            state, metrics = self._step(state, inputs.batch(t), t, nudge)
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
        self,
        state: ReferenceState,
        batch: Batch,
        step: int,
        nudge: Callable[[Params], Params] | None = None,
    ) -> tuple[HostMetrics, Params, PyTree]:
        """Returns metrics, gradients of the mean loss, and the new model state."""
        model_state = state.model_state
        self._find_powers(state, batch, step)
        sums: dict[str, np.ndarray] = {}  # f64[2] each: total and weight, over micro-batches
        dtypes: dict[str, Any] = {}
        grads = None
        for rows, key in self._micro_batches(batch, jax.random.fold_in(state.key, step)):
            (_, (pairs, size, model_state)), micro_grads = self._loss_and_grads(
                state.params, model_state, self._to_device(rows), key
            )
            for name, pair in pairs.items():
                dtypes[name] = pair[0].dtype
                pair = float(pair[0]), float(pair[1]) / self._powers.weight_divisor(name)
                sums[name] = sums.get(name, np.zeros(2)) + np.array(pair)
            micro_grads = jax.tree.map(lambda g, s=float(size): _to_f32(g) * s, micro_grads)
            grads = micro_grads if grads is None else jax.tree.map(np.add, grads, micro_grads)
        weight = float(sums["loss"][1])
        scale = 1 / weight if weight else 0.0
        trained = self._trained(state.params)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, trained)
        grads = nudge(grads) if nudge else grads
        means = {name: _divide(pair[0], pair[1], dtypes[name]) for name, pair in sums.items()}
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
            taken = functools.partial(take_rows, index=slice(i, None, n))
            yield map_rows(taken, batch, self._row_dims), key

    @property
    def _row_dims(self) -> RowDims:
        return self.row_dims or list_row_dims(list_leaves(self.spec.batch), self.spec.row_dims)

    @functools.cached_property
    def _powers(self) -> RowPowers:
        return RowPowers(self.spec.accumulate.micro_batches)

    def _find_powers(self, state: ReferenceState, batch: Batch, step: int) -> None:
        _, key = next(self._micro_batches(batch, jax.random.fold_in(state.key, step)))
        of_rows = functools.partial(self._loss_and_grads, state.params, state.model_state)
        self._powers.find(
            lambda rows: of_rows(self._to_device(rows), key)[0][1][0], batch, self._row_dims
        )

    def _step(
        self,
        state: ReferenceState,
        batch: Batch,
        step: int,
        nudge: Callable[[Params], Params] | None,
    ) -> tuple[ReferenceState, HostMetrics]:
        metrics, grads, model_state = self.gradients(state, batch, step, nudge)
        if self.spec.on_nonfinite != "apply":
            finite = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
            metrics[SKIPPED] = np.float32(not finite)
        params, opt_state = self._update(
            grads, metrics["loss"], state, self._to_device(batch), np.uint32(step)
        )
        return ReferenceState(params, opt_state, model_state, state.key), metrics

    def _evaluate(self, state: ReferenceState, batch: Batch) -> HostMetrics:
        key = jax.random.fold_in(state.key, _EVALUATION)
        _, (pairs, *_) = self._eval_loss(
            state.params, state.model_state, self._to_device(batch), key
        )
        return {name: _divide(pair[0], pair[1], pair[0].dtype) for name, pair in pairs.items()}

    def _partition(self, params: Params) -> Partition:
        return find_partition(self.spec, params)

    def _trained(self, params: Params) -> Params:
        return self._partition(params).trained(params)

    def _to_device(self, rows: Batch) -> Batch:
        return jax.device_put(rows, self.device)

    @functools.cached_property
    def _init(self) -> Callable[[Key], tuple[Any, ...]]:
        spec = self.spec

        def run(key: Key) -> tuple[Any, ...]:
            steps_key = jax.random.fold_in(key, _STEPS)
            variables = spec.init(key)
            if not isinstance(variables, Variables):
                variables = Variables(variables, {})
            params = jax.tree.map(
                lambda x: jnp.asarray(x.value if isinstance(x, WithAxes) else x),
                variables.params,
                is_leaf=lambda x: isinstance(x, WithAxes),
            )
            trained = cast_floats(self._trained(params), spec.precision.param_dtype)
            params = self._partition(params).merge(trained, params)
            return params, spec.optimizer.init(trained), variables.model_state, steps_key

        return _jit_alone(run)

    @functools.cached_property
    def _loss_and_grads(self) -> Callable[..., Any]:
        """The gradients of `_build_plain_loss`, as `jax.value_and_grad` returns them."""
        loss, compute = _build_plain_loss(self.spec, train=True), self.spec.precision.compute_dtype

        def run(params: Params, *args: Any) -> Any:
            params = cast_floats(params, compute)
            of_trained = self._partition(params).of_trained(loss, params)
            return jax.value_and_grad(of_trained, has_aux=True)(self._trained(params), *args)

        return _jit_alone(run)

    @functools.cached_property
    def _eval_loss(self) -> Callable[..., Any]:
        """`_build_plain_loss` for evaluation."""
        loss = _build_plain_loss(self.spec, train=False)
        compute = self.spec.precision.compute_dtype
        return _jit_alone(lambda params, *args: loss(cast_floats(params, compute), *args))

    @functools.cached_property
    def _update(self) -> Callable[..., tuple[Params, PyTree]]:
        """`(grads, loss, state, batch, step) → (params, opt_state)`."""

        def apply(
            grads: Params, loss: Scalar, state: ReferenceState, batch: Batch, step: Any
        ) -> tuple[Params, PyTree]:
            partition = self._partition(state.params)
            trained = partition.trained(state.params)

            def value_and_grad(moved: Params) -> tuple[Scalar, Params]:
                params = partition.merge(moved, state.params)
                key = jax.random.fold_in(state.key, step)
                return self._mean_and_grads(params, state.model_state, batch, key)

            updates, opt_state = call_update(
                self.spec.optimizer,
                grads,
                state.opt_state,
                trained,
                loss,
                value_and_grad=value_and_grad,
            )
            moved = optax.apply_updates(trained, updates)
            return partition.merge(moved, state.params), opt_state

        return jax.jit(apply)

    def _mean_and_grads(
        self, params: Params, model_state: PyTree, batch: Batch, step_key: Key
    ) -> tuple[Scalar, Params]:
        """Loss and gradient of other parameters, while it is traced: for optimizers that ask."""
        total, weight, divisor = jnp.zeros(()), jnp.zeros(()), self._powers.weight_divisor("loss")
        grads = jax.tree.map(jnp.zeros_like, self._trained(params))
        for rows, key in self._micro_batches(batch, step_key):
            (_, (pairs, size, model_state)), micro = self._loss_and_grads(
                params, model_state, rows, key
            )
            total, weight = total + pairs["loss"][0], weight + pairs["loss"][1] / divisor
            micro = jax.tree.map(functools.partial(jnp.multiply, size), micro)
            grads = jax.tree.map(lambda x, y: x + y.astype(x.dtype), grads, micro)
        return total / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)


def _jit_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a user's function without the caller's mesh and without its own constraints.

    When called, it raises VerificationError if the function maps over devices of its own choice.
    """
    compiled = on_any_mesh(jax.jit(without_constraints(function)))

    def run(*args: Any) -> Any:
        try:
            # While an optimizer that asks for the loss is traced, its mesh is hidden already.
            tracing = any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
            with contextlib.nullcontext() if tracing else no_ambient_mesh():
                return compiled(*args)
        except ValueError as error:
            if not re.search("mesh passed to shard_map|incompatible devices", str(error)):
                raise
            why = f"names devices of its own, which one device is not: {first_line(error)}"
            fix = "jax.shard_map(...) without mesh=; or sk.verify(make_step, ...), make_step(mesh)"
            headline = "The reference cannot run."
            raise VerificationError.of(headline, "the model", why, fix) from error

    return run


@functools.lru_cache(maxsize=8)
def _jit_sgd_update(sgd: optax.GradientTransformation) -> Callable[..., Params]:
    """`(grads, opt_state, params) → params`, compiled once for all runs that share `sgd`."""

    def apply(grads: Params, opt_state: PyTree, params: Params) -> Params:
        return optax.apply_updates(params, sgd.update(grads, opt_state, params)[0])

    return jax.jit(apply)


def _build_plain_loss(spec: StepSpec, *, train: bool) -> Callable[..., Any]:
    """The user's loss: `(params, model_state, batch, key) → (total / size, (pairs, size, state))`.

    `pairs` is `{name: (total, weight)}` of the loss and the metrics, `state` the new model state.
    `size` is the weight, or 1 where that is less: the gradients of a sum overflow in float16.
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
        pairs = {name: _split_mean(m) for name, m in {"loss": value, **metrics}.items()}
        total, weight = pairs["loss"]
        size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(weight), 1.0))
        return total / size, (pairs, size, model_state)

    return run


def _split_mean(value: Any) -> tuple[jax.Array, jax.Array]:
    """Total and weight, f32[] or f64[] each; a plain number has weight 1."""
    total, weight = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
    total = jnp.asarray(total)
    total = total.astype(jnp.promote_types(total.dtype, jnp.float32))
    return total, jnp.asarray(weight, total.dtype)


def _to_f32(x: jax.Array) -> np.ndarray:
    """To the host in f32 or wider: micro-batches are summed in at least f32."""
    return np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _divide(total: Any, weight: Any, dtype: Any) -> np.ndarray:
    """The mean; 0 if the weight is 0."""
    return np.asarray(float(total) / float(weight) if float(weight) else 0.0, dtype)
