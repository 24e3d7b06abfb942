"""Exchange with other tools through one safetensors file; needs the extra `[safetensors]`."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.errors import CheckpointError, Problem, format_problems, raise_all
from .._core.io._files import os_errors_as, write_atomic
from .._core.tree import leaves_by_path, short_type
from ._fingerprint import is_key
from ._manifest import SavedLeaf
from ._match import plan
from ._restore import Request

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def export_safetensors(
    path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a pytree of arrays to a new file, each leaf under its path.

    The whole tree is on the host for a moment: give it parameters, not a train state.

    Args:
      path: of the file; it appears when it is complete, and none is overwritten.
      tree: pytree of arrays: `state.params`.
      metadata: texts for the file's header.

    Raises:
      CheckpointError: the file exists or cannot be written, or a leaf has a dtype that the format
        lacks.
    """
    target, leaves = Path(path), leaves_by_path(tree)
    known = set(_DTYPES.values())
    problems = [
        Problem(name, f"{short_type(x.shape, x.dtype)} has no word in the format")
        for name, x in leaves.items()
        if is_key(x.dtype) or x.dtype.name not in known
    ]
    if target.exists():
        problems.append(Problem(str(target), "exists already", "another file name"))
    raise_all(CheckpointError, "Nothing was exported.", problems, "export state.params alone")
    # The library writes a transposed array's memory as it lies, which is another array.
    host = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in leaves.items()}
    library, fix = (
        _library("safetensors"),
        "a folder with free space, and permission to write there",
    )
    refusals = os_errors_as(CheckpointError, "Nothing was exported.", target, fix)
    with refusals, write_atomic(target) as part:
        try:
            _library("safetensors.numpy").save_file(host, part, dict(metadata or {}))
        except library.SafetensorError as error:  # in which it wraps what the system refuses
            raise OSError(str(error)) from error


def import_safetensors(
    path: str | os.PathLike[str],
    abstract: Any,
    shardings: Any = None,
    *,
    partial: Mapping[str, str] | None = None,
    fresh: Any = None,
    cast: tuple[str, ...] = (),
) -> Any:
    """Reads a pytree from a file, each device only what it is to hold.

    Args:
      path: of a file whose tensors are named by path: `layers/gate`.
      abstract: pytree of `jax.ShapeDtypeStruct`: `step.abstract_state.params`.
      shardings: as for `Checkpointer.restore`, and so are `partial`, `fresh` and `cast`.
      partial: which leaves come from where.
      fresh: leaves that do not come from the file.
      cast: globs of leaves whose dtype may change.

    Raises:
      CheckpointError: the file cannot be read, or its tensors are not the wanted ones; every
        difference is named.
    """
    wanted = leaves_by_path(abstract)
    request = Request(abstract, shardings, partial, fresh, cast)
    placed = request.shardings_of(wanted)
    library = _library("safetensors")
    try:
        file = library.safe_open(path, framework="np")
    except (OSError, library.SafetensorError) as error:
        problem = Problem(str(path), f"cannot be read: {error}")
        fix = "a file that export_safetensors or another tool wrote"
        raise CheckpointError(format_problems("Nothing was imported.", [problem], fix)) from error
    with file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        saved = {name: _describe(one) for name, one in slices.items()}
        found = plan(saved, wanted, partial, cast, str(path))
        got = request.fresh_leaves(found.fresh)
        for name in found.saved:
            shape, one = tuple(wanted[name].shape), slices[name]
            got[name] = jax.make_array_from_callback(shape, placed[name], _reader(one))
    for name in found.cast:
        got[name] = got[name].astype(wanted[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [got[name] for name in wanted])


def _describe(one: Any) -> SavedLeaf:
    dtype = one.get_dtype()
    return SavedLeaf(tuple(one.get_shape()), _DTYPES.get(dtype, dtype.lower()), "")


def _reader(one: Any) -> Any:
    dtype = jnp.dtype(_describe(one).dtype)
    # An index of a scalar is empty, which the library does not take.
    return lambda index: np.asarray(one[index] if index else one[...]).astype(dtype)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = Problem(name, "is not installed", "pip install 'shardkit[safetensors]'")
        raise CheckpointError(format_problems("A package is missing.", [problem])) from error
