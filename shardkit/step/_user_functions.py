"""What a user passes as `loss_fn` and `init`, and the leaves that `init` returns.

Each mistake here would otherwise be an exception of Python or JAX from inside of a trace, which
names neither the argument nor the leaf: a class in place of a function, a function of too few
arguments, an activation function among the parameters.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .._core.batch_values import SupportsArray, is_list, list_problem
from .._core.errors import Problem, ShardingError, StepError, raise_all
from .._core.signatures import call_problem
from .._core.tree import flatten_tree, is_numeric, join_path, path_str
from .._core.types import Loss, PyTree, Variables, has_axes
from ..nn._manual_axis_rules import ShardMapLoss

if TYPE_CHECKING:
    from ._spec import StepSpec

# The adapter of each library's modules, by the package that defines their base class.
_ADAPTERS = {
    "flax.nnx": "sk.from_nnx(lambda rngs: Net(rngs=rngs), loss)",
    "flax.linen": "sk.from_linen(Net(...), loss, batch)",
    "equinox": "sk.from_equinox(lambda key: Net(key=key), loss)",
}
_LOSS = ("params", "batch", "key")
_STATEFUL = (*_LOSS, "model_state")


def function_problems(spec: "StepSpec") -> Iterator[Problem]:
    """Functions of a spec that cannot be called as a step calls them."""
    loss = spec.loss_fn
    if isinstance(loss, Loss):
        names = _STATEFUL if loss.stateful else _LOSS
        yield from _signature_problems("loss_fn.train", loss.train, names)
        yield from _signature_problems("loss_fn.evaluate", loss.evaluate, names)
    elif isinstance(loss, ShardMapLoss):
        yield from _signature_problems("loss_fn.local", loss.local, _LOSS)
        yield from _signature_problems("loss_fn.reference", loss.reference, _LOSS)
    else:
        yield from _signature_problems("loss_fn", loss, _LOSS)
    yield from _signature_problems("init", spec.init, ("key",))
    if callable(spec.trainable):
        yield from _signature_problems("trainable", spec.trainable, ("path",))


def _signature_problems(
    subject: str, function: Callable[..., Any], names: tuple[str, ...]
) -> Iterator[Problem]:
    if not callable(function):
        if "." in subject:  # of others `type_problems` says it
            why = f"is of type {type(function).__name__}, not a function of {', '.join(names)}"
            yield Problem(subject, why, f"def loss_fn({', '.join(names)}): ...")
        return
    name = "loss_fn" if names[0] == "params" else subject
    fix = f"def {name}({', '.join(names)}): ..."
    owner = function.__self__ if inspect.ismethod(function) else function
    cls = owner if isinstance(owner, type) else type(owner)
    adapter = _find_adapter(cls)
    # Modules of linen cannot be called outside of `apply`; others can be a loss, but no init.
    unbound = adapter == _ADAPTERS["flax.linen"] or (owner is function and subject == "init")
    if isinstance(function, type) or (adapter and unbound):
        kind = "the class" if isinstance(owner, type) else "a module of class"
        kind = "a method of a module of class" if owner is not function else kind
        why = f"is {kind} {cls.__name__}, not a function of {', '.join(names)}"
        model = f"model = {adapter}; {subject}=model.{name}"
        yield Problem(subject, why, model if adapter else fix)
        return
    if why := call_problem(function, names):
        yield Problem(subject, why, fix)


def _find_adapter(kind: type) -> str:
    """How a module of this class is adapted, or nothing."""
    for base in kind.__mro__:
        for package, call in _ADAPTERS.items():
            if f"{base.__module__}.".startswith(f"{package}.") and base.__name__ == "Module":
                return call
    return ""


def to_variables(initial: PyTree) -> Variables:
    """What `init` returned, with the model state that it has or none."""
    variables = initial if isinstance(initial, Variables) else Variables(initial, {})
    flatten_tree(variables.params, "params")
    flatten_tree(variables.model_state, "model_state")
    return variables


def collect_axes(params: PyTree) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of the parameters that name them, one entry per dim, by path.

    Raises ShardingError with every leaf that names more axes than it has dims.
    """
    named = [
        (path_str(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=has_axes)
        if has_axes(leaf)
    ]
    problems = [
        Problem(
            join_path("params", path),
            f"is named by the text {x.axes!r}, not by a tuple of names"
            if isinstance(x.axes, str)
            else f"{len(x.axes)} names {x.axes} for {x.value.ndim} dims",
        )
        for path, x in named
        if isinstance(x.axes, str) or len(x.axes) > x.value.ndim
    ]
    fix = 'at most one name or None per dim, such as ("embed", "mlp")'
    raise_all(ShardingError, "Logical axes do not fit.", problems, fix)
    return {path: (*x.axes, *[None] * (x.value.ndim - len(x.axes))) for path, x in named}


def check_initial(initial: PyTree) -> None:
    """Raises StepError if `init` returned no parameter, or leaves that are no arrays of numbers."""
    variables = to_variables(initial)
    problems = [
        problem
        for name in ("params", "model_state")
        for problem in _leaf_problems(getattr(variables, name), name)
    ]
    if not problems and not jax.tree.leaves(variables.params):
        why = f"is {variables.params!r}, without a leaf: there is nothing to train"
        problems = [Problem("params", why, 'def init(key): return {"w": jnp.zeros((4, 8))}')]
    raise_all(StepError, "init does not return arrays.", problems)


def _leaf_problems(tree: PyTree, name: str) -> Iterator[Problem]:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: has_axes(x) or _is_matrix(x)
    )
    adapter = _find_module(tree)
    for path, x in leaves:
        value, at = x.value if has_axes(x) else x, join_path(name, path_str(path))
        if _is_matrix(value):
            yield list_problem(at, value)
        elif not is_numeric(value):
            fix = "leave it out of the tree: loss_fn can refer to it by its name"
            fix = "jnp.asarray(...) of it" if isinstance(value, SupportsArray) else fix
            fix = f"model = {adapter}; init=model.init, loss_fn=model.loss_fn" if adapter else fix
            yield Problem(at, f"is {_describe(value)}, not an array of numbers", fix)


def _is_matrix(x: Any) -> bool:
    """Whether a node is a list of lists of numbers; one of numbers may be several parameters."""
    return is_list(x) and any(isinstance(row, list | tuple) for row in x)


def _find_module(tree: PyTree) -> str:
    """How the first module in a tree is adapted, or nothing."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: bool(_find_adapter(type(x))))
    return next((call for node in nodes if (call := _find_adapter(type(node)))), "")


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, np.ndarray | np.generic):
        return f"an array of {value.dtype}"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    return f"of type {type(value).__name__}"
