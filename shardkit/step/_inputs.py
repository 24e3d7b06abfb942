"""What a step is called with: checked by name, put where it was declared."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._core.donation import check_not_donated
from .._core.errors import BatchError, Problem, StateError, raise_all
from .._core.tree import leaves_by_path, short_type
from ..data import place_rows, process_rows, rows_of_shardings


def put_batch(batch: Any, abstract: Any, shardings: Any, *, move: bool = False) -> Any:
    """Puts a batch on the mesh as declared; leaves that are there already are not touched.

    Args:
      batch: pytree of host arrays, uncommitted device arrays or arrays laid out as declared. Of
        several processes each gives the rows of its own devices.
      abstract: pytree of `jax.ShapeDtypeStruct`, global shapes.
      shardings: pytree of `NamedSharding`.
      move: also take leaves that are committed to other devices or layouts.

    Raises:
      BatchError: the structure, a shape, a dtype or, unless they may move, the devices of a leaf
        are not the declared.
    """
    check_not_donated(batch, "batch", "The step got a batch that is gone.")
    got, structure = jax.tree_util.tree_flatten(batch)
    want, declared = jax.tree_util.tree_flatten(abstract)
    if structure != declared:
        _raise_structure(batch, abstract)
    placed = jax.tree.leaves(shardings)
    if not all(map(_in_place, got, want, placed)):
        names = [*leaves_by_path(abstract, "batch")]
        _check_leaves(names, got, want, placed, move)
        got = [
            x if _in_place(x, a, s) else _put(x, a, s)
            for x, a, s in zip(got, want, placed, strict=True)
        ]
    return jax.tree_util.tree_unflatten(structure, got)


def fed_rows(shardings: Any, rows: int) -> np.ndarray:
    """Rows of a global batch that this process gives to `put_batch`, i64[n]."""
    return rows_of_shardings(shardings, rows)


def put_key(key: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Puts a key, which every process has made, on a mesh that may span processes."""
    if sharding.is_fully_addressable or _is_global(key):
        return jax.device_put(key, sharding)
    words = np.asarray(jax.random.key_data(key))
    shared = jax.make_array_from_callback(words.shape, sharding, lambda index: words[index])
    return jax.random.wrap_key_data(shared, impl=jax.random.key_impl(key))


def _put(x: Any, abstract: Any, sharding: NamedSharding) -> jax.Array:
    if not sharding.is_fully_addressable and not _is_global(x):
        return place_rows(x, _held(abstract, sharding), abstract.shape[0], sharding)
    return jax.device_put(
        x if isinstance(x, jax.Array) else np.asarray(x, abstract.dtype), sharding
    )


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _held(abstract: Any, sharding: NamedSharding) -> np.ndarray:
    return process_rows(sharding.mesh, sharding.spec, abstract.shape[0])


def _in_place(x: Any, abstract: Any, sharding: NamedSharding) -> bool:
    return (
        isinstance(x, jax.Array)
        and x.shape == abstract.shape
        and x.dtype == abstract.dtype
        and (x.sharding == sharding or x.sharding.is_equivalent_to(sharding, x.ndim))
    )


def _check_leaves(
    names: Sequence[str],
    got: Sequence[Any],
    want: Sequence[Any],
    placed: Sequence[NamedSharding],
    move: bool,
) -> None:
    problems = []
    for name, x, abstract, sharding in zip(names, got, want, placed, strict=True):
        shape, dtype = np.shape(x), jax.dtypes.canonicalize_dtype(jax.numpy.result_type(x))
        wanted = _fed_shape(x, abstract, sharding)
        if (shape, dtype) != (wanted, abstract.dtype):
            problems.append(_misfit(name, short_type(shape, dtype), shape, wanted, abstract))
        elif (
            not move
            and isinstance(x, jax.Array)
            and x.committed
            and not _in_place(x, abstract, sharding)
        ):
            why = f"is committed to {_where(x.sharding)}; the step has it as {sharding.spec}"
            problems.append(Problem(name, why, "pass host numpy, or step.put(batch)"))
    raise_all(BatchError, "The batch is not what the step was compiled for.", problems)


def _fed_shape(x: Any, abstract: Any, sharding: NamedSharding) -> tuple[int, ...]:
    """The shape to be given: of several processes each feeds the rows of its own devices."""
    if sharding.is_fully_addressable or _is_global(x):
        return abstract.shape
    return (len(_held(abstract, sharding)), *abstract.shape[1:])


def _misfit(
    subject: str, got: str, shape: tuple[int, ...], wanted: tuple[int, ...], abstract: Any
) -> Problem:
    rows = abstract.shape[:1]
    if wanted[:1] != rows and shape[:1] != wanted[:1]:
        share = f"{rows[0]} global / {rows[0] // wanted[0]}"
        found = shape[0] if shape else "a scalar"
        why = f"process {jax.process_index()} must feed {wanted[0]} rows ({share}), got {found}"
        return Problem(subject, why, "batch of its own rows: x[step.rows] of the global batch's x")
    expected = short_type(wanted, abstract.dtype)
    why = f"is {got}; the step was compiled for {expected}"
    return Problem(subject, why, "feed the declared shapes, or compile_step again")


def _where(sharding: Any) -> str:
    devices = len(sharding.device_set)
    spec = f" as {sharding.spec}" if isinstance(sharding, NamedSharding) else ""
    return f"{devices} device{'s' if devices > 1 else ''}{spec}"


def _raise_structure(batch: Any, abstract: Any) -> None:
    got, want = (leaves_by_path(tree, "batch").keys() for tree in (batch, abstract))
    problems = [Problem(p, "is declared and was not given") for p in sorted(want - got)]
    problems += [Problem(p, "was given and is not declared") for p in sorted(got - want)]
    problems = problems or [Problem("batch", "has the declared leaves in other containers")]
    fix = f"a batch with leaves {', '.join(leaves_by_path(abstract))}"
    raise_all(BatchError, "The batch is not what the step was compiled for.", problems, fix)


def check_given(state: Any) -> None:
    """Refuses a state whose buffers an earlier step consumed.

    Raises:
      StateError: naming the leaves that are gone.
    """
    check_not_donated(state, "state", "The step got a state that is gone.")


def check_apart(state: Any) -> None:
    """Refuses a state two of whose leaves are one buffer: donated twice, it ends the interpreter.

    Raises:
      StateError: naming each leaf with the one whose buffer it shares.
    """
    first: dict[tuple[Any, int], str] = {}
    problems = []
    for path, x in leaves_by_path(state, "state").items():
        if isinstance(x, jax.Array) and x.size and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            piece = x.addressable_data(0)
            place = (piece.device, piece.unsafe_buffer_pointer())
            other = first.setdefault(place, path)
            if other != path:
                problems.append(Problem(path, f"is the same buffer as {other}"))
    fix = "copy one of each pair with jnp.copy"
    raise_all(StateError, "Leaves of the state share buffers.", problems, fix)


def check_state(state: Any, abstract: Any, shardings: Any) -> None:
    """Says in which leaves a state differs from the one that a step was compiled for.

    Raises:
      StateError: naming each leaf with both types and specs.
    """
    got, want, specs = (leaves_by_path(tree, "state") for tree in (state, abstract, shardings))
    problems = [Problem(p, "is missing") for p in want if p not in got]
    problems += [Problem(p, "is not part of this step's state") for p in got if p not in want]
    for path in [p for p in want if p in got]:
        x, a = got[path], want[path]
        if (np.shape(x), jax.numpy.result_type(x)) != (a.shape, a.dtype):
            types = short_type(np.shape(x), jax.numpy.result_type(x)), short_type(a.shape, a.dtype)
            problems.append(Problem(path, f"is {types[0]}; the step has {types[1]}"))
        elif isinstance(x, jax.Array) and not x.sharding.is_equivalent_to(specs[path], x.ndim):
            why = f"is on {_where(x.sharding)}; the step has it as {specs[path].spec}"
            problems.append(Problem(path, why))
    fix = "state = step.init(key), or jax.device_put(state, step.shardings)"
    raise_all(StateError, "The state is not what the step was compiled for.", problems, fix)
