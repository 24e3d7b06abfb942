"""`sk.from_linen`: a flax linen module and its variable collections as pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze

from .._core.own_sharding import on_any_mesh
from .._core.types import Batch, Key, Loss, Params, Variables
from ._model import Model, accept_key, pad_axes, split_loss_output

# Collections that a forward pass writes for its caller, and that the next pass does not read.
_OUTPUTS = ("intermediates", "losses", "perturbations")


def from_linen(
    module: nn.Module,
    loss: Callable[..., Any],
    batch: Batch,
    *,
    inputs: str | Sequence[str] | Callable[[Any], Any] = "x",
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Model:
    """Turns a flax linen module into the `init` and `loss_fn` of a step.

    Args:
      module: the module.
      loss: `(outputs, batch) -> loss` or `(outputs, batch, key) -> loss`, with the results that
        `sk.StepSpec` allows; `outputs` is what the module returns.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, the batch of the `sk.StepSpec`; the module
        is initialised with zeros of these shapes.
      inputs: the module's arguments in a batch: a key, several keys for several arguments, or a
        function of the batch that returns an argument or a tuple of them.
      train: keyword arguments of the module in training, such as `{"train": True}`.
      evaluate: the same in `step.evaluate`, such as `{"train": False}`.
      rngs: names of the random streams that the module draws from besides `params`.

    Returns:
      A `Model`. Logical axes are those of `nn.with_logical_partitioning` and
      `nn.with_partitioning`; as in a `PartitionSpec`, dims after the last name have none. Every
      collection but `params`, such as batch statistics, is in `state.model_state`.

    >>> import jax, flax.linen as nn
    >>> batch = {"x": jax.numpy.ones((8, 4))}
    >>> model = from_linen(nn.Dense(2), lambda y, batch: (y ** 2).mean(), batch)
    >>> sorted(jax.eval_shape(model.init, jax.random.key(0)))
    ['bias', 'kernel']
    """
    call = accept_key(loss)
    arguments = _make_argument_getter(inputs)

    def init(key: Key) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments(batch))
        streams = dict(zip(("params", *rngs), jax.random.split(key, 1 + len(rngs)), strict=True))
        variables = unfreeze(module.init(streams, *zeros, **(train or {})))
        params = jax.tree.map(_with_axes, variables.pop("params", {}), is_leaf=_is_boxed)
        model_state = {name: x for name, x in variables.items() if name not in _OUTPUTS}
        return Variables(params, meta.unbox(model_state)) if model_state else params

    key = jax.eval_shape(lambda: jax.random.key(0))
    stateful = isinstance(on_any_mesh(jax.eval_shape)(init, key), Variables)

    def run(
        options: Mapping[str, Any], params: Params, batch: Batch, key: Key, model_state: Any
    ) -> Any:
        collections = model_state or {}
        module_key, loss_key = jax.random.split(key)
        streams = dict(zip(rngs, jax.random.split(module_key, len(rngs)), strict=True))
        outputs, updated = module.apply(
            {"params": params, **collections},
            *arguments(batch),
            rngs=streams,
            mutable=list(collections),
            **options,
        )
        value, metrics = split_loss_output(call(outputs, batch, loss_key))
        return (value, metrics, unfreeze(updated)) if stateful else (value, metrics)

    def run_train(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(train or {}, params, batch, key, model_state)

    def run_evaluate(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(evaluate or {}, params, batch, key, model_state)

    def bind(params: Params, model_state: Any = None) -> Callable[..., Any]:
        return lambda *args: module.apply(
            {"params": params, **(model_state or {})}, *args, **(evaluate or {})
        )

    return Model(init, Loss(run_train, run_evaluate, stateful), bind)


def _make_argument_getter(
    inputs: str | Sequence[str] | Callable[[Any], Any],
) -> Callable[[Any], tuple[Any, ...]]:
    if isinstance(inputs, str):
        return lambda batch: (batch[inputs],)
    if isinstance(inputs, Sequence):
        return lambda batch: tuple(batch[name] for name in inputs)

    def get(batch: Batch) -> tuple[Any, ...]:
        arguments = inputs(batch)
        return arguments if isinstance(arguments, tuple) else (arguments,)

    return get


def _is_boxed(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _with_axes(x: Any) -> Any:
    return pad_axes(x.value, x.names) if isinstance(x, nn.Partitioned) else x
