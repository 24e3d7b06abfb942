"""`sk.from_nnx`: a flax nnx module, which holds its arrays, as pure functions of them.

The module's parameters become nested dicts by attribute names, so that rules see
`layers/0/kernel`. Its random streams are not state of a step: each step seeds them from its key,
so that draws depend on the key and the step alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from .._core.errors import Problem, ShardingError, StepError, first_line, raise_all
from .._core.trainable import parse_trainable
from .._core.types import Batch, Key, Loss, Params, Variables
from ._arguments import check_model, loss_problems, maker_problems
from ._model import Model, accept_key, check_state_is_given, nest, pad_axes, split_loss_output
from ._nnx_scopes import named_scopes

# An attribute that is a bare array, as a table of positions, has no variable around it.
Flat = list[tuple[tuple[Any, ...], nnx.Variable | jax.Array]]


def from_nnx(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    loss: Callable[..., Any],
    *,
    trainable: Any = nnx.Param,
) -> Model:
    """Turns a flax nnx module into the `init` and `loss_fn` of a step.

    Args:
      make_model: `rngs -> module`.
      loss: `(module, batch) -> loss` or `(module, batch, key) -> loss`, with the results that
        `sk.StepSpec` allows. The module is in training mode (`module.train()`) in steps and in
        evaluation mode (`module.eval()`) in `step.evaluate`; dropout layers need no key. What it
        sows is there after the call: `nnx.pop(module, nnx.Intermediate)`.
      trainable: nnx filter of the variables that the optimizer updates, or a dict or `nnx.State` of
        booleans, as for `sk.StepSpec`. Every other `nnx.Param` is frozen and stays in
        `state.params`; variables of other types, such as batch statistics, and arrays without a
        variable are in `state.model_state`.

    Returns:
      A `Model`. Logical axes are those of the variables' sharding metadata
      (`nnx.with_partitioning(init, ("embed", "mlp"))`, `nnx.Param(x, out_sharding=...)`).

    Raises:
      StepError: `make_model` or `loss` cannot be called so, or the former makes no module.

    >>> import jax
    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(4, 2, rngs=rngs),
    ...                  lambda module, batch: (module(batch) ** 2).mean())
    >>> params = jax.eval_shape(model.init, jax.random.key(0))
    >>> sorted(params)
    ['bias', 'kernel']
    """
    check_model(
        chain(
            maker_problems(make_model, "rngs", nnx.Module), loss_problems(loss, ("module", "batch"))
        )
    )
    call, tree = accept_key(loss), None
    if isinstance(trainable, Mapping):
        tree = parse_trainable(trainable)
        trainable = lambda path, _: tree("/".join(map(str, path)))  # noqa: E731
    template = _make_template(make_model, trainable)

    def init(key: Key) -> Any:
        params, _, model_state = _split_variables(_build(make_model, key), trainable)
        _check_names(params)
        values = nest([(path, _with_axes(variable)) for path, variable in params])
        return Variables(values, _read_values(model_state)) if model_state else values

    def run(training: bool, params: Params, batch: Batch, key: Key, model_state: Any) -> Any:
        module = template.merge(params, model_state, key)
        module.train() if training else module.eval()
        with named_scopes(module):
            value, metrics = split_loss_output(call(module, batch, key))
        if not template.model_state:
            return value, metrics
        # What the pass has sown is read by the loss alone, so the next pass does not need it.
        own = {path for path, _ in template.model_state}
        written = _split_variables(module, trainable)[2]
        return value, metrics, _read_values([(p, x) for p, x in written if p in own])

    def train(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(True, params, batch, key, model_state)

    def evaluate(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(False, params, batch, key, model_state)

    def bind(params: Params, model_state: Any = None) -> nnx.Module:
        paths = ["/".join(map(str, path)) for path, _ in template.model_state]
        check_state_is_given(model_state, paths)
        module = template.merge(params, model_state, jax.random.key(0))
        module.eval()
        return module

    stateful, trained = bool(template.model_state), template.trained
    # Globs are not used, since a name may have a `*` in it.
    selected = tree or (trained.__contains__ if len(trained) < len(template.params) else None)
    return Model(init, Loss(train, evaluate, stateful=stateful, trainable=selected), bind)


@dataclasses.dataclass(frozen=True)
class _Template:
    """The structure of a module, and its variables without values."""

    graph: nnx.GraphDef
    params: Flat
    streams: Flat
    model_state: Flat
    trained: frozenset[str]

    def merge(self, params: Params, model_state: Any, key: Key) -> Any:
        """Returns the module with these arrays, its random streams seeded from `key`."""
        flat = [*_fill(self.params, params), *_fill(self.model_state, model_state)]
        for number, (path, variable) in enumerate(self.streams):
            flat.append((path, _replace(variable, _seed(variable, key, number))))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def _make_template(make_model: Callable[[nnx.Rngs], nnx.Module], trainable: Any) -> _Template:
    built = []

    def make() -> Any:
        module = _build(make_model, jax.random.key(0))
        built.append((nnx.graphdef(module), nnx.to_flat_state(nnx.state(module, trainable))))
        return _split_states(module, trainable)

    # `nnx.eval_shape` makes a module of shapes, in which flax finds no arrays without a variable.
    params, streams, model_state = map(_flatten, jax.eval_shape(make))
    graph, selected = built[-1]
    trained = frozenset("/".join(map(str, path)) for path, _ in selected)
    return _Template(graph, params, streams, model_state, trained)


def _build(make_model: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    # By default flax looks for a mesh as soon as a variable names logical axes.
    headline, fix = "The model is declared wrongly.", "lambda rngs: Net(..., rngs=rngs)"
    try:
        with nnx.use_eager_sharding(False):
            module = make_model(nnx.Rngs(key))
    except TraceContextError as error:
        why = f"changes a variable from outside, such as another nnx.Rngs: {first_line(error)}"
        raise StepError.of(headline, "make_model", why, fix) from error
    if not isinstance(module, nnx.Module):
        why = f"returns a {type(module).__name__}, not an nnx.Module"
        raise StepError.of(headline, "make_model", why, fix)
    _mark_arrays(module)
    return module


def _mark_arrays(module: nnx.Module) -> None:
    """Marks arrays that are attributes of the module or its parts as its data.

    flax does by itself, but under Python 3.11 takes those made while tracing for settings.
    """
    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.Pytree):
            for name, value in list(vars(part).items()):
                if isinstance(value, jax.Array) and not nnx.is_data(value):
                    setattr(part, name, nnx.data(value))


def _split_states(module: nnx.Module, trainable: Any) -> tuple[nnx.State, nnx.State, nnx.State]:
    """Returns parameters, random streams, and all else but what was sown."""
    filters = (nnx.Any(trainable, nnx.Param), nnx.RngState, nnx.Intermediate, ...)
    params, streams, _, model_state = nnx.state(module, *filters)
    return params, streams, model_state


def _split_variables(module: nnx.Module, trainable: Any) -> tuple[Flat, Flat, Flat]:
    """The same by path."""
    params, streams, model_state = _split_states(module, trainable)
    return _flatten(params), _flatten(streams), _flatten(model_state)


def _flatten(state: nnx.State) -> Flat:
    return list(nnx.to_flat_state(state))


def _check_names(params: Flat) -> None:
    """Raises ShardingError with every variable that has mesh axes in place of logical names."""
    problems = []
    for path, variable in params:
        sharding = _read_sharding(variable)
        if isinstance(sharding, jax.sharding.Sharding):
            why = f"has a {type(sharding).__name__} on devices; a module names its dims, a strategy"
            fix = 'nnx.Param(x, out_sharding=("embed", "mlp")), or no sharding and sk.PathRules'
            problems.append(Problem("/".join(map(str, path)), f"{why} lays them out", fix))
    raise_all(ShardingError, "Variables of the module are laid out already.", problems)


def _read_sharding(variable: nnx.Variable | jax.Array) -> Any:
    # flax stores `sharding` and `sharding_names` of every version as `out_sharding`.
    metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
    return metadata.get("out_sharding")


def _with_axes(variable: nnx.Variable | jax.Array) -> Any:
    axes = _read_sharding(variable)
    return pad_axes(variable[...], axes) if axes else variable[...]


def _seed(variable: nnx.Variable | jax.Array, key: jax.Array, number: int) -> jax.Array:
    if isinstance(variable, nnx.RngKey):
        stream_key = jax.random.fold_in(key, number)
        shape = variable.shape
        return jax.random.split(stream_key, shape) if shape else stream_key
    return jnp.zeros(variable.shape, variable.dtype)


def _read_values(flat: Flat) -> Any:
    return nest([(path, variable[...]) for path, variable in flat])


def _fill(flat: Flat, values: Any) -> Flat:
    filled = []
    for path, variable in flat:
        node = values
        for name in path:
            node = node[str(name)]
        filled.append((path, _replace(variable, node)))
    return filled


def _replace(variable: nnx.Variable | jax.Array, value: Any) -> Any:
    return variable.replace(value) if isinstance(variable, nnx.Variable) else value
