"""Checks the arguments of a step leaf by leaf, and moves a batch to its declared shardings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from .._core.batch_values import (
    check_order,
    is_array,
    is_list,
    is_stream,
    list_problem,
    to_arrays,
    value_problems,
)
from .._core.donation import check_not_donated
from .._core.errors import BatchError, Problem, StateError, raise_all
from .._core.row_dims import with_dim
from .._core.train_state import TrainState
from .._core.tree import flatten_tree, leaves_by_path, short_type
from .._core.types import Batch, Key, PyTree
from ..data import place_rows, process_rows
from ._given_leaves import place_given
from ._layout import RESIDUALS, StepLayout


def put_batch(batch: Batch, layout: StepLayout, *, move: bool = False) -> Batch:
    """Moves a batch to its declared shardings; leaves that are there already stay.

    Leaves are host arrays, uncommitted device arrays or arrays in their declared sharding; with
    `move`, also ones committed to other devices or shardings. With several processes each passes
    the rows of its own devices, and leaves without rows whole. Raises BatchError if the structure,
    or the shape, dtype or (without `move`) devices of a leaf differ from the declared ones.
    """
    check_not_donated(batch, "batch", "The batch was donated.")
    values, structure = jax.tree_util.tree_flatten(batch)
    leaves, declared_structure = jax.tree_util.tree_flatten(layout.batch)
    if structure != declared_structure:
        _raise_structure(batch, layout.batch)
    shardings = jax.tree.leaves(layout.batch_shardings)
    if not all(map(_is_placed, values, leaves, shardings)):
        names = leaves_by_path(layout.batch, "batch")
        declared = list(map(_DeclaredLeaf, names, leaves, shardings, layout.row_dims))
        _check_leaves(declared, values, move)
        values = [leaf.place(x) for leaf, x in zip(declared, values, strict=True)]
    return jax.tree_util.tree_unflatten(structure, values)


def take_batch(batch: Batch) -> Batch:
    """Returns a batch of arrays and Python's numbers; BatchError with all NumPy cannot read."""
    if not is_stream(batch) and all(map(is_array, flatten_tree(batch, "batch")[0])):
        return batch
    problems = list(value_problems(batch))
    raise_all(BatchError, "The batch does not consist of arrays.", problems)
    return to_arrays(batch)


def take_arguments(state: TrainState, batch: Batch) -> Batch:
    """Returns the batch of a step's arguments, its leaves arrays or numbers of Python.

    Raises StateError if they are swapped, or the state was donated; BatchError if a leaf of the
    batch is not numbers.
    """
    check_order(state, batch)
    check_not_donated(state, "state", "The state was donated.")
    return take_batch(batch)


def put_key(key: Key, sharding: NamedSharding) -> Key:
    """Replicates a key over a mesh that can span processes, each of which has the key."""
    if sharding.is_fully_addressable or _is_global(key):
        return jax.device_put(key, sharding)
    words = np.asarray(jax.random.key_data(key))
    shared = jax.make_array_from_callback(words.shape, sharding, lambda index: words[index])
    return jax.random.wrap_key_data(shared, impl=jax.random.key_impl(key))


def put_given(
    params: PyTree | None, model_state: PyTree | None, layout: StepLayout
) -> dict[str, PyTree]:
    """Returns the fields of a state that a user gives, placed, without residuals of compression.

    Raises StateError with every leaf that does not fit.
    """
    given: dict[str, PyTree] = {}
    for name, tree in (("params", params), ("model_state", model_state)):
        if tree is not None:
            own, targets = (getattr(t, name) for t in (layout.state, layout.shardings))
            if name == "model_state":
                own = {key: x for key, x in own.items() if key != RESIDUALS}
            given[name] = place_given(tree, own, targets, name)
    return given


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _is_placed(x: Any, abstract: jax.ShapeDtypeStruct, sharding: NamedSharding) -> bool:
    return (
        isinstance(x, jax.Array)
        and x.shape == abstract.shape
        and x.dtype == abstract.dtype
        and (x.sharding == sharding or x.sharding.is_equivalent_to(sharding, x.ndim))
    )


@dataclasses.dataclass(frozen=True)
class _DeclaredLeaf:
    """One leaf of the batch that a step was compiled for; `row_dim` counts its rows."""

    path: str
    abstract: jax.ShapeDtypeStruct
    sharding: NamedSharding
    row_dim: int | None

    def is_placed(self, x: Any) -> bool:
        """Whether a leaf is on its devices, as declared."""
        return _is_placed(x, self.abstract, self.sharding)

    def place(self, x: Any) -> jax.Array:
        """Places a leaf that fits, if it is not placed yet."""
        if self.is_placed(x):
            return x
        if not self._takes_local_rows(x):
            x = x if isinstance(x, jax.Array) else np.asarray(x, self.abstract.dtype)
            return jax.device_put(x, self.sharding)
        rows = 0 if self.row_dim is None else self.abstract.shape[self.row_dim]
        return place_rows(x, self._local_rows, rows, self.sharding, (self.row_dim,))

    def local_shape(self, x: Any) -> tuple[int, ...]:
        """The shape that this process must pass: the rows of its own devices."""
        if self.row_dim is None or not self._takes_local_rows(x):
            return self.abstract.shape
        return with_dim(self.abstract.shape, self.row_dim, len(self._local_rows))

    def mismatch(self, x: Any, expected: tuple[int, ...]) -> Problem:
        """The problem of a leaf of another type than declared."""
        shape, dim, mine = np.shape(x), self.row_dim, expected != self.abstract.shape
        if mine and dim is not None and shape[dim : dim + 1] != expected[dim : dim + 1]:
            # 64 rows on 4 processes: "process 1 must pass 16 rows (64 global / 4), got 64".
            rows, local = self.abstract.shape[dim], expected[dim]
            passed = shape[dim] if dim < len(shape) else "a scalar"
            why = f"process {jax.process_index()} must pass {local} rows "
            why += f"({rows} global / {rows // local}), got {passed}"
            return Problem(self.path, why, "the process's own rows: x[step.local_rows]")
        got = short_type(shape, jax.dtypes.canonicalize_dtype(jnp.result_type(x)))
        why = f"is {got}; the step was compiled for {short_type(expected, self.abstract.dtype)}"
        return Problem(self.path, why, "pass the declared shapes, or compile_step again")

    def _takes_local_rows(self, x: Any) -> bool:
        return not self.sharding.is_fully_addressable and not _is_global(x)

    @property
    def _local_rows(self) -> np.ndarray:
        mesh, dim = self.sharding.mesh, self.row_dim
        assert isinstance(mesh, Mesh)
        if dim is None:
            return np.arange(0)
        return process_rows(mesh, self.sharding.spec, self.abstract.shape[dim], row_dim=dim)


def _check_leaves(declared: Sequence[_DeclaredLeaf], values: Sequence[Any], move: bool) -> None:
    problems = []
    for leaf, x in zip(declared, values, strict=True):
        shape, dtype = np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x))
        expected = leaf.local_shape(x)
        if (shape, dtype) != (expected, leaf.abstract.dtype):
            problems.append(leaf.mismatch(x, expected))
        elif not move and isinstance(x, jax.Array) and x.committed and not leaf.is_placed(x):
            where = _describe_sharding(x.sharding)
            why = f"is committed to {where}; the step has it as {leaf.sharding.spec}"
            problems.append(Problem(leaf.path, why, "pass host numpy, or step.shard_batch(batch)"))
    raise_all(BatchError, "The batch is not what the step was compiled for.", problems)


def _describe_sharding(sharding: Any) -> str:
    devices = len(sharding.device_set)
    spec = f" as {sharding.spec}" if isinstance(sharding, NamedSharding) else ""
    return f"{devices} device{'s' if devices > 1 else ''}{spec}"


def _raise_structure(batch: Batch, abstract: Batch) -> None:
    got = leaves_by_path(batch, "batch", is_leaf=is_list)
    want = leaves_by_path(abstract, "batch")
    problems = [list_problem(path, x) for path, x in got.items() if is_list(x)]
    problems += [Problem(p, "is declared but missing") for p in sorted(want.keys() - got)]
    problems += [Problem(p, "is not declared") for p in sorted(got.keys() - want)]
    problems = problems or [Problem("batch", "has the declared leaves in other containers")]
    fix = f"a batch with leaves {', '.join(leaves_by_path(abstract))}"
    raise_all(BatchError, "The batch is not what the step was compiled for.", problems, fix)


def check_buffers_distinct(state: TrainState) -> None:
    """Raises StateError for leaves that share a buffer, which would be donated twice and crash."""
    first: dict[tuple[Any, int], str] = {}
    problems = []
    for path, x in leaves_by_path(state, "state").items():
        if isinstance(x, jax.Array) and x.size and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            shard = x.addressable_data(0)
            buffer = (shard.device, shard.unsafe_buffer_pointer())
            other = first.setdefault(buffer, path)
            if other != path:
                problems.append(Problem(path, f"is the same buffer as {other}"))
    fix = "copy one of each pair with jnp.copy"
    raise_all(StateError, "Leaves of the state share buffers.", problems, fix)


def check_state(state: TrainState, abstract: TrainState, shardings: TrainState) -> None:
    """Raises StateError with each leaf, both types and specs, that a step was not compiled for."""
    got, declared, specs = (leaves_by_path(tree, "state") for tree in (state, abstract, shardings))
    problems = [Problem(p, "is missing") for p in declared if p not in got]
    problems += [Problem(p, "is not part of this step's state") for p in got if p not in declared]
    for path in [p for p in declared if p in got]:
        x, a = got[path], declared[path]
        if (np.shape(x), jax.numpy.result_type(x)) != (a.shape, a.dtype):
            types = short_type(np.shape(x), jax.numpy.result_type(x)), short_type(a.shape, a.dtype)
            problems.append(Problem(path, f"is {types[0]}; the step has {types[1]}"))
        elif isinstance(x, jax.Array) and not x.sharding.is_equivalent_to(specs[path], x.ndim):
            why = f"is on {_describe_sharding(x.sharding)}; the step has it as {specs[path].spec}"
            problems.append(Problem(path, why))
    fix = "state = step.init(key), or jax.device_put(state, step.shardings)"
    raise_all(StateError, "The state is not what the step was compiled for.", problems, fix)
