"""Moves parameters and model state that a user has into their declared shardings.

Each device gets its shard alone: of a host array (or a memory map) only the elements of the shard
are read. The result has buffers of its own, since a step donates its state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._core.donation import check_not_donated
from .._core.errors import Problem, StateError, raise_all
from .._core.tree import leaves_by_path, short_type
from .._core.types import PyTree, strip_axes

_HEADLINE = "The given {} are not those of this step."


def place_given(given: PyTree, abstract: PyTree, shardings: PyTree, name: str) -> PyTree:
    """Returns the arrays of a user, by the paths of the declared leaves, as leaves of a state.

    They are numpy arrays or `jax.Array`s in any sharding; containers may be of another type.
    Floating-point leaves are cast to the declared dtype. Raises StateError with every leaf that is
    missing, not declared, or of another shape or dtype; `name` is the tree's: `params`.
    """
    check_not_donated(given, name, f"The given {name} were donated.")
    bare = strip_axes(given)
    found, declared, targets = (leaves_by_path(t, name) for t in (bare, abstract, shardings))
    problems = [
        Problem(f"{path} {short_type(x.shape, x.dtype)}", "is missing", _missing_fix(name, path))
        for path, x in declared.items()
        if path not in found
    ]
    for path, x in found.items():
        if path not in declared:
            fix = "a tree with the paths of step.abstract_state"
            problems.append(Problem(path, f"is not part of this step's {name}", fix))
        elif why := _misfit(x, declared[path]):
            problems.append(Problem(path, why, f"the shapes of step.abstract_state.{name}"))
    raise_all(StateError, _HEADLINE.format(name), problems)
    placed = [_place(found[path], x, targets[path]) for path, x in declared.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def _missing_fix(name: str, path: str) -> str:
    """Code that takes a leaf from a state that was drawn."""
    names = path.split("/")[1:]
    keys = "".join(f"[{int(key) if key.isdigit() else key!r}]" for key in names)
    return f"given{keys} = step.init(key).{name}{keys}"


def _misfit(x: Any, declared: jax.ShapeDtypeStruct) -> str:
    """Why a value cannot be a leaf; "" if it can."""
    want = short_type(declared.shape, declared.dtype)
    try:
        shape, dtype = np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x))
    except TypeError:
        return f"is of type {type(x).__name__}; the step has {want}"
    floats = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, declared.dtype))
    if shape == declared.shape and (floats or dtype == declared.dtype):
        return ""
    return f"is {short_type(shape, dtype)}; the step has {want}"


def _place(x: Any, declared: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array):
        moved = jax.device_put(x, sharding, may_alias=False)
        return moved if moved.dtype == declared.dtype else moved.astype(declared.dtype)
    host: Any = x if isinstance(x, np.ndarray) else np.asarray(x)
    return jax.make_array_from_callback(
        declared.shape, sharding, lambda index: np.array(host[index], declared.dtype)
    )
