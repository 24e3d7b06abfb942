"""flax linen: a module and its variable collections become pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze

from .._core.types import Loss, Variables, WithAxes
from ._model import Model, accept_key, split_loss_output

# Collections that a forward pass writes for its caller, and that no next pass reads.
_OUTPUTS = ("intermediates", "losses", "perturbations")


def from_linen(
    module: nn.Module,
    loss: Callable[..., Any],
    batch: Any,
    *,
    inputs: str | Sequence[str] | Callable[[Any], Any] = "x",
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Model:
    """Adapts a linen module.

    Args:
      module: the module.
      loss: `(outputs, batch) -> loss` or `(outputs, batch, key) -> loss`, as `compile_step` takes
        it; `outputs` is what the module returned.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, as given to `compile_step`; the module is
        initialised with zeros of these shapes.
      inputs: which part of a batch the module is called with: a key, several keys for several
        arguments, or a function of the batch that returns an argument or a tuple of them.
      train: keyword arguments of the module in training, such as `{"train": True}`.
      evaluate: the same in `step.evaluate`, such as `{"train": False}`.
      rngs: names of the random streams that the module draws from besides `params`.

    Returns:
      A `Model`. Logical axes are read from `nn.with_partitioning` and
      `nn.with_logical_partitioning`. Every collection but `params` (batch statistics) is carried
      as `state.model_state`.

    >>> import jax, flax.linen as nn
    >>> batch = {"x": jax.numpy.ones((8, 4))}
    >>> model = from_linen(nn.Dense(2), lambda y, batch: (y ** 2).mean(), batch)
    >>> sorted(jax.eval_shape(model.init, jax.random.key(0)))
    ['bias', 'kernel']
    """
    call = accept_key(loss)
    arguments = _arguments(inputs)

    def init(key: jax.Array) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments(batch))
        streams = dict(zip(("params", *rngs), jax.random.split(key, 1 + len(rngs)), strict=True))
        made = unfreeze(module.init(streams, *zeros, **(train or {})))
        params = jax.tree.map(_with_axes, made.pop("params", {}), is_leaf=_is_boxed)
        model_state = {name: made[name] for name in made if name not in _OUTPUTS}
        return Variables(params, meta.unbox(model_state)) if model_state else params

    stateful = isinstance(
        jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))), Variables
    )

    def run(options: Mapping[str, Any], params: Any, batch: Any, key: Any, model_state: Any) -> Any:
        collections = model_state or {}
        for_module, for_loss = jax.random.split(key)
        streams = dict(zip(rngs, jax.random.split(for_module, len(rngs)), strict=True))
        outputs, changed = module.apply(
            {"params": params, **collections},
            *arguments(batch),
            rngs=streams,
            mutable=list(collections),
            **options,
        )
        value, metrics = split_loss_output(call(outputs, batch, for_loss))
        return (value, metrics, unfreeze(changed)) if stateful else (value, metrics)

    def run_train(params: Any, batch: Any, key: Any, model_state: Any = None) -> Any:
        return run(train or {}, params, batch, key, model_state)

    def run_evaluate(params: Any, batch: Any, key: Any, model_state: Any = None) -> Any:
        return run(evaluate or {}, params, batch, key, model_state)

    def bind(params: Any, model_state: Any = None) -> Callable[..., Any]:
        return lambda *args: module.apply(
            {"params": params, **(model_state or {})}, *args, **(evaluate or {})
        )

    return Model(init, Loss(run_train, run_evaluate, stateful), bind)


def _arguments(
    inputs: str | Sequence[str] | Callable[[Any], Any],
) -> Callable[[Any], tuple[Any, ...]]:
    if isinstance(inputs, str):
        return lambda batch: (batch[inputs],)
    if isinstance(inputs, Sequence):
        return lambda batch: tuple(batch[name] for name in inputs)

    def pick(batch: Any) -> tuple[Any, ...]:
        picked = inputs(batch)
        return picked if isinstance(picked, tuple) else (picked,)

    return pick


def _is_boxed(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _with_axes(x: Any) -> Any:
    return WithAxes(x.value, tuple(x.names)) if isinstance(x, nn.Partitioned) else x
