"""`sk.from_equinox`: an Equinox module, a pytree of arrays and settings, as pure functions.

The module's floating-point arrays become nested dicts by attribute names, so that rules see
`layers/0/weight`. Settings, such as activation functions, are kept as they are.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import Problem, ShardingError, StepError, raise_all
from .._core.tree import leaves_by_path, path_str
from .._core.types import Batch, Key, Loss, Params, PyTree, Trainable, Variables, WithAxes
from ..rules import matches
from ._arguments import check_model, loss_problems, maker_problems
from ._model import Model, check_state_is_given, nest, split_loss_output, takes_argument

Names = tuple[str | None, ...]


def from_equinox(
    make_model: Callable[[Key], Any],
    loss: Callable[..., Any],
    *,
    axes: Mapping[str, Names] | None = None,
    trainable: Trainable = None,
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
      trainable: the parameters that are trained, the others are frozen: globs over paths, a
        predicate, or a tree of booleans, as for `sk.StepSpec`.

    Returns:
      A `Model`. Its parameters are the module's floating-point arrays. Its other arrays, and those
      of its state, are in `state.model_state`, the latter below `state`.

    Raises:
      StepError: the package equinox is not installed, or `make_model` or `loss` cannot be called
        so.
      ShardingError: a glob of `axes` matches no parameter.
      TreeError: two leaves of the module have the same path.

    >>> import equinox as eqx, jax
    >>> model = from_equinox(lambda key: eqx.nn.Linear(4, 2, key=key),
    ...                      lambda module, batch: (jax.vmap(module)(batch) ** 2).mean())
    >>> sorted(jax.eval_shape(model.init, jax.random.key(0)))
    ['bias', 'weight']
    """
    equinox = _import_equinox()
    check_model(maker_problems(make_model, "key", equinox.Module))
    template = _ModuleTemplate.of(equinox.filter_eval_shape(make_model, jax.random.key(0)))
    arguments = ("module", "state", "batch") if template.has_state else ("module", "batch")
    check_model(loss_problems(loss, arguments))
    names = _match_axes(axes or {}, template.params)
    takes_key = takes_argument(loss, len(arguments))

    def init(key: Key) -> Any:
        params, others = template.split(make_model(key), names)
        return Variables(params, others) if others else params

    def run(training: bool, params: Params, batch: Batch, key: Key, model_state: Any) -> Any:
        module, state = template.merge(params, model_state)
        module = module if training else equinox.nn.inference_mode(module)
        rest = (batch, key) if takes_key else (batch,)
        if not template.has_state:
            value, metrics = split_loss_output(loss(module, *rest))
            return (value, metrics, model_state) if template.others else (value, metrics)
        out, state = _split_state(loss(module, state, *rest))
        value, metrics = split_loss_output(out)
        return value, metrics, template.split((module, state))[1]

    def train(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(True, params, batch, key, model_state)

    def evaluate(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(False, params, batch, key, model_state)

    def bind(params: Params, model_state: Any = None) -> Any:
        check_state_is_given(model_state, template.others)
        module, state = template.merge(params, model_state or {})
        module = equinox.nn.inference_mode(module)
        return (module, state) if template.has_state else module

    loss_fn = Loss(train, evaluate, stateful=bool(template.others), trainable=trainable)
    return Model(init, loss_fn, bind)


@dataclasses.dataclass(frozen=True)
class _ModuleLeaf:
    """One leaf of a module or of its state."""

    # of its attributes, keys and indices; those of state begin with a name of its own
    names: tuple[str, ...]
    value: Any  # a setting, or an array without values
    is_param: bool  # whether it is a floating-point array of the module

    @property
    def path(self) -> str:
        """By which rules name it."""
        return "/".join(self.names)


@dataclasses.dataclass(frozen=True)
class _ModuleTemplate:
    """The structure of a module and its state, and its leaves, arrays without values."""

    structure: Any  # of `(module, state)`
    leaves: tuple[_ModuleLeaf, ...]  # in its order
    has_state: bool  # whether there is a state

    @classmethod
    def of(cls, made: Any) -> "_ModuleTemplate":
        """Reads an abstract module, or `(module, state)`; raises TreeError for equal paths."""
        taken, name = {path.split("/")[0] for path in leaves_by_path(_as_pair(made)[0])}, "state"
        while name in taken:  # by an attribute of the module
            name += "_"
        keyed, structure = jax.tree_util.tree_flatten_with_path(_as_pair(made))
        leaves = []
        for (part, *keys), x in keyed:
            inside = tuple(path_str((key,)) for key in keys)
            inexact = isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)
            names = (name, *inside) if part.idx else inside
            leaves.append(_ModuleLeaf(names, x, inexact and not part.idx))
        return cls(structure, tuple(leaves), isinstance(made, tuple))

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The floating-point arrays of the module, by path."""
        return {leaf.path: leaf.value for leaf in self.leaves if leaf.is_param}

    @property
    def others(self) -> list[str]:
        """The paths of arrays that are not parameters."""
        return [leaf.path for leaf in self.leaves if _is_array(leaf) and not leaf.is_param]

    def split(self, made: Any, axes: Mapping[str, Names] | None = None) -> tuple[Params, PyTree]:
        """Returns the parameters and the other arrays of a module, or of `(module, state)`.

        Parameters have the logical axis names of `{path: names}`.
        """
        pairs = zip(self.leaves, jax.tree.leaves(_as_pair(made)), strict=True)
        arrays = [(leaf, jnp.asarray(x)) for leaf, x in pairs if _is_array(leaf)]
        named = axes or {}
        params = nest(
            (leaf.names, WithAxes(x, named[leaf.path]) if leaf.path in named else x)
            for leaf, x in arrays
            if leaf.is_param
        )
        return params, nest((leaf.names, x) for leaf, x in arrays if not leaf.is_param)

    def merge(self, params: Params, others: PyTree) -> Any:
        """Returns `(module, state)` with these arrays."""

        def read(leaf: _ModuleLeaf) -> Any:
            if not _is_array(leaf):
                return leaf.value
            return functools.reduce(
                lambda node, name: node[name], leaf.names, params if leaf.is_param else others
            )

        return self.structure.unflatten(map(read, self.leaves))


def _is_array(leaf: _ModuleLeaf) -> bool:
    return isinstance(leaf.value, jax.ShapeDtypeStruct)


def _as_pair(made: Any) -> tuple[Any, Any]:
    return made if isinstance(made, tuple) else (made, None)


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
