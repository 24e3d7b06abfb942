"""The arguments of a step before their types are compared: their order, and what is no array.

A leaf that NumPy can read, such as a tensor of torch on the host, becomes its array. What is not
numbers is named by its path: strings, objects, typed keys, and lists, which JAX takes as trees.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from .errors import Problem, StateError, first_line
from .train_state import TrainState
from .tree import flatten_tree, is_numeric, leaves_by_path, short_type
from .types import Batch, PyTree

_KEYS_FIX = "jax.random.key_data(keys), and jax.random.wrap_key_data in the loss"
_ORDER = "step(state, batch), with state = step.init(jax.random.key(0))"


@runtime_checkable
class SupportsArray(Protocol):
    """What NumPy can read, such as a tensor of torch on the host."""

    def __array__(self) -> Any: ...


def check_order(state: Any, batch: Any) -> None:
    """Raises StateError if a step is not called with a state and then a batch."""
    is_swapped = isinstance(batch, TrainState)
    if isinstance(state, TrainState) and not is_swapped:
        return
    why = f"is of type {type(state).__name__}, not a train state"
    why += "; the batch is one: are they swapped?" if is_swapped else ""
    raise StateError.of("A step takes a state and a batch.", "state", why, _ORDER)


def to_arrays(batch: Batch) -> Batch:
    """Returns a batch with the leaves that NumPy can read as its arrays, the others as they are."""
    if is_stream(batch):
        return batch
    leaves, structure = flatten_tree(batch, "batch")
    return structure.unflatten(
        x if _is_known(x) or _value_problem("", x) else np.asarray(x) for x in leaves
    )


def to_abstract(batch: Batch) -> PyTree:
    """Returns a declared batch as `ShapeDtypeStruct`s, of the dtypes that arrays of JAX have."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)),
        to_arrays(batch),
    )


def value_problems(batch: Batch) -> Iterator[Problem]:
    """Leaves of a batch that are not numbers and cannot be read as such."""
    if is_stream(batch):
        yield _stream_problem(batch)
        return
    for path, x in leaves_by_path(batch, "batch").items():
        if isinstance(x, jax.ShapeDtypeStruct):
            shape = short_type(x.shape, x.dtype)
            yield Problem(path, f"is the shape {shape} alone, without numbers", "an array")
        elif problem := _value_problem(path, x):
            yield problem


def declaration_problems(batch: Batch) -> Iterator[Problem]:
    """Leaves of a declared batch that are not arrays; a list of numbers counts as one."""
    if is_stream(batch):
        yield _stream_problem(batch)
        return
    for path, x in leaves_by_path(batch, "batch", is_leaf=is_list).items():
        if is_list(x):
            yield list_problem(path, x)
        elif problem := _value_problem(path, x):
            yield problem
        elif isinstance(x, int | float | complex) and not isinstance(x, np.generic):
            why = f"is of type {type(x).__name__}, not an array"
            yield Problem(path, why, "numpy.asarray(...)")


def is_stream(batch: Any) -> bool:
    """Whether a batch is an iterator of batches, which JAX warns of as a leaf."""
    return isinstance(batch, Iterator)


def _stream_problem(batch: Any) -> Problem:
    fix = "one batch of it: next(iter(...)), or a call of the function"
    return Problem("batch", f"is of type {type(batch).__name__}, not a batch", fix)


def list_problem(path: str, x: Any) -> Problem:
    """The problem of a list in the place of a leaf."""
    why = f"is a {type(x).__name__} of {len(x)} items, which JAX takes as a tree"
    return Problem(path, why, "numpy.asarray(...) of it")


def is_list(x: Any) -> bool:
    """Whether a node is a list or tuple, nested or not, of numbers or strings of Python."""
    if not isinstance(x, list | tuple) or not x:
        return False
    return all(isinstance(item, int | float | str) or is_list(item) for item in x)


def _is_known(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) or is_numeric(x)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array of numbers."""
    known = isinstance(x, jax.Array | np.ndarray) and not isinstance(x, np.ma.MaskedArray)
    return known and not _is_unusable(x.dtype)


def _is_unusable(dtype: Any) -> bool:
    # The dtype of typed keys is not NumPy's.
    return not isinstance(dtype, np.dtype) or dtype.kind in "OSUMm" or dtype.type is np.void


def _value_problem(path: str, x: Any) -> Problem | None:
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct) and _is_unusable(x.dtype):
        why = f"is {short_type(x.shape, x.dtype)}, typed keys, not numbers"
        return Problem(path, why, _KEYS_FIX)
    if isinstance(x, np.ma.MaskedArray):
        why = "is a masked array, whose mask no array of JAX has"
        return Problem(path, why, "x.filled(0), and numpy.ma.getmaskarray(x) as a leaf beside it")
    if _is_known(x):
        return None
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        why = f"is of type {type(x).__name__}, which NumPy cannot read: {first_line(error)}"
        return Problem(path, why, "x.detach().float().cpu().numpy() of a torch tensor")
    if is_numeric(array):
        return None
    if path == "batch" and isinstance(x, Iterable | Callable):
        return _stream_problem(x)
    what = f"an array of {x.dtype}" if isinstance(x, np.ndarray | np.generic) else ""
    why = f"is {what or f'of type {type(x).__name__}'}, not an array of numbers"
    return Problem(path, why, "numbers, such as token ids; or keep it out of the batch")
