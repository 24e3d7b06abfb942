"""`sk.from_equinox`: an Equinox module, a pytree of arrays and settings, as pure functions.

The module's floating-point arrays become nested dicts by attribute names, so that rules see
`layers/0/weight`. Settings, such as activation functions, are kept as they are.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import Problem, ShardingError, StepError, raise_all
from .._core.tree import path_str
from .._core.types import Batch, Key, Loss, Params, PyTree, Variables, WithAxes
from ..rules import matches
from ._model import Model, nest, split_loss_output, takes_argument

Names = tuple[str | None, ...]


def from_equinox(
    make_model: Callable[[Key], Any],
    loss: Callable[..., Any],
    *,
    axes: Mapping[str, Names] | None = None,
) -> Model:
    """Turns an Equinox module into the `init` and `loss_fn` of a step.

    Args:
      make_model: `key -> module`; or `key -> (module, state)` for a module with state, such as
        `lambda key: eqx.nn.make_with_state(Net)(key=key)`.
      loss: `(module, batch) -> loss` or `(module, batch, key) -> loss`, with the results that
        `sk.StepSpec` allows. With state it is `(module, state, batch) -> (loss, state)`, again
        with or without a key behind. It calls the module as Equinox does, for one row under
        `jax.vmap`; the module is in inference mode in `step.evaluate`.
      axes: logical axis names of parameters, by globs over their paths as in `sk.PathRules`:
        `{"**/up/weight": ("mlp", "embed")}`. The first match wins.

    Returns:
      A `Model`. Its parameters are the module's floating-point arrays. Its other arrays, and those
      of its state, are in `state.model_state`.

    Raises:
      StepError: the package equinox is not installed.
      ShardingError: a glob of `axes` matches no parameter.

    >>> import equinox as eqx, jax
    >>> model = from_equinox(lambda key: eqx.nn.Linear(4, 2, key=key),
    ...                      lambda module, batch: (jax.vmap(module)(batch) ** 2).mean())
    >>> sorted(jax.eval_shape(model.init, jax.random.key(0)))
    ['bias', 'weight']
    """
    equinox = _import_equinox()
    template = _ModuleTemplate.of(equinox.filter_eval_shape(make_model, jax.random.key(0)))
    names = _match_axes(axes or {}, template.params)
    takes_key = takes_argument(loss, 3 if template.has_state else 2)

    def init(key: Key) -> Any:
        arrays = template.arrays_of(make_model(key))
        params = {
            path: WithAxes(arrays[path], names[path]) if path in names else arrays[path]
            for path in template.params
        }
        others = {path: arrays[path] for path in template.others}
        return Variables(_nest(params), _nest(others)) if others else _nest(params)

    def run(training: bool, params: Params, batch: Batch, key: Key, model_state: Any) -> Any:
        module, state = template.merge(params, model_state)
        module = module if training else equinox.nn.inference_mode(module)
        rest = (batch, key) if takes_key else (batch,)
        if not template.has_state:
            value, metrics = split_loss_output(loss(module, *rest))
            return (value, metrics, model_state) if template.others else (value, metrics)
        out, state = _split_state(loss(module, state, *rest))
        value, metrics = split_loss_output(out)
        arrays = template.arrays_of((module, state))
        return value, metrics, _nest({path: arrays[path] for path in template.others})

    def train(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(True, params, batch, key, model_state)

    def evaluate(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(False, params, batch, key, model_state)

    def bind(params: Params, model_state: Any = None) -> Any:
        module, state = template.merge(params, model_state or {})
        module = equinox.nn.inference_mode(module)
        return (module, state) if template.has_state else module

    return Model(init, Loss(train, evaluate, stateful=bool(template.others)), bind)


@dataclasses.dataclass(frozen=True)
class _ModuleTemplate:
    """The structure of a module and its state, and its leaves, arrays without values.

    Attributes:
      structure: of `(module, state)`.
      leaves: `(path, leaf)` in its order; the paths of state begin with `state/`.
      has_state: whether there is a state.
    """

    structure: Any
    leaves: tuple[tuple[str, Any], ...]
    has_state: bool

    @classmethod
    def of(cls, made: Any) -> "_ModuleTemplate":
        """Reads a module, or `(module, state)`, whose arrays are abstract."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(_as_pair(made))
        named = tuple((_path_of(path), leaf) for path, leaf in leaves)
        return cls(structure, named, isinstance(made, tuple))

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The floating-point arrays of the module, by path."""
        return {path: x for path, x in self._arrays.items() if _is_param(path, x)}

    @property
    def others(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All other arrays, by path."""
        return {path: x for path, x in self._arrays.items() if not _is_param(path, x)}

    @property
    def _arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: x for path, x in self.leaves if isinstance(x, jax.ShapeDtypeStruct)}

    def arrays_of(self, made: Any) -> dict[str, jax.Array]:
        """Returns the arrays of a module, or of `(module, state)`, by path."""
        leaves = jax.tree.leaves(_as_pair(made))
        named = zip(self.leaves, leaves, strict=True)
        return {path: jnp.asarray(x) for (path, _), x in named if path in self._arrays}

    def merge(self, params: Params, others: PyTree) -> Any:
        """Returns `(module, state)` with these arrays."""

        def read(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            node = params if _is_param(path, leaf) else others
            for name in path.split("/"):
                node = node[name]
            return node

        return self.structure.unflatten([read(path, leaf) for path, leaf in self.leaves])


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return nest((path.split("/"), x) for path, x in arrays.items())


def _as_pair(made: Any) -> tuple[Any, Any]:
    return made if isinstance(made, tuple) else (made, None)


def _path_of(path: tuple[Any, ...]) -> str:
    """The path of a leaf of `(module, state)`."""
    inside = path_str(path[1:])
    return f"state/{inside}" if path[0].idx else inside


def _is_param(path: str, x: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact) and not path.startswith("state/")


def _split_state(out: Any) -> tuple[Any, Any]:
    """Returns the loss, with its metrics if it has any, and the new state."""
    if isinstance(out, tuple) and len(out) == 2:
        return out
    why = f"returned {type(out).__name__}, and the module has state"
    problem = Problem("loss", why, "return loss, state; or return (loss, metrics), state")
    raise_all(StepError, "The loss does not return what a step can use.", [problem])
    raise AssertionError


def _match_axes(
    axes: Mapping[str, Names], params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Names]:
    found = {
        path: next(names for glob, names in axes.items() if matches(glob, path))
        for path in params
        if any(matches(glob, path) for glob in axes)
    }
    paths = ", ".join(params)
    problems = [
        Problem(f"axes[{glob!r}]", f"matches no parameter; there are {paths}", "**/weight")
        for glob in axes
        if not any(matches(glob, path) for path in params)
    ]
    raise_all(ShardingError, "Logical axes name no parameter.", problems)
    return found


def _import_equinox() -> Any:
    try:
        return importlib.import_module("equinox")
    except ModuleNotFoundError as error:
        problem = Problem("equinox", "is not installed", "pip install equinox")
        raise_all(StepError, "sk.from_equinox needs the package equinox.", [problem])
        raise AssertionError from error
