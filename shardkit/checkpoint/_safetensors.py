"""Exports and imports a pytree as one safetensors file; needs the extra `[safetensors]`."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.errors import CheckpointError, Problem, format_problems, raise_all
from .._core.io._files import local_path, os_errors_as, write_atomic
from .._core.tree import leaves_by_path, short_type
from ._fingerprint import is_key
from ._manifest import SavedLeaf
from ._match import plan_restore
from ._restore import RestoreRequest

DTYPES = {
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

    The whole tree is copied to the host: export parameters, not a train state.

    Args:
      path: of the file, which appears when it is complete; no file is overwritten.
      tree: pytree of arrays: `state.params`.
      metadata: texts for the file's header.

    Raises:
      CheckpointError: the file exists or cannot be written, or the format lacks a leaf's dtype.
    """
    target = local_path(path, CheckpointError, "Nothing was exported.")
    leaves = leaves_by_path(tree)
    known = set(DTYPES.values())
    problems = [
        Problem(name, f"{short_type(x.shape, x.dtype)} is not a dtype of the format")
        for name, x in leaves.items()
        if is_key(x.dtype) or x.dtype.name not in known
    ]
    if target.exists():
        problems.append(Problem(str(target), "exists already", "another file name"))
    raise_all(CheckpointError, "Nothing was exported.", problems, "export state.params only")
    # The library ignores strides: it would write a transposed array as if it were contiguous.
    host = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in leaves.items()}
    library = _import_library("safetensors")
    fix = "a folder with free space, and permission to write there"
    errors = os_errors_as(CheckpointError, "Nothing was exported.", target, fix)
    with errors, write_atomic(target) as temporary:
        try:
            _import_library("safetensors.numpy").save_file(host, temporary, dict(metadata or {}))
        except library.SafetensorError as error:  # which wraps errors of the system
            raise OSError(str(error)) from error


def import_safetensors(
    path: str | os.PathLike[str],
    abstract: Any,
    shardings: Any = None,
    *,
    partial: Mapping[str, str] | None = None,
    fresh: Any = None,
    cast: tuple[str, ...] = (),
    rename: Mapping[str, str] | None = None,
) -> Any:
    """Reads a pytree from a file; each device reads only its shards.

    Args:
      path: of a file whose tensors are named by their paths: `layers/gate`.
      abstract: pytree of `jax.ShapeDtypeStruct`: `step.abstract_state.params`.
      shardings: as for `Checkpointer.restore`, and so are `partial`, `fresh` and `cast`.
      partial: the source of each leaf.
      fresh: leaves that do not come from the file.
      cast: globs of leaves whose dtype may change.
      rename: `{glob: new path}` for tensors that have other names in the file.

    Raises:
      CheckpointError: the file cannot be read, or its tensors do not fit; every difference is
        named.
    """
    path, wanted = local_path(path, CheckpointError), leaves_by_path(abstract)
    request = RestoreRequest(abstract, shardings, partial, fresh, cast)
    shardings_by_path = request.shardings_of(wanted)
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        saved = {name: _saved_leaf(tensor) for name, tensor in slices.items()}
        plan = plan_restore(saved, wanted, partial, cast, str(path), rename=rename)
        leaves = request.fresh_leaves(plan.fresh)
        for name, stored in plan.saved.items():
            shape, tensor = tuple(wanted[name].shape), slices[stored]
            leaves[name] = jax.make_array_from_callback(
                shape, shardings_by_path[name], _make_reader(tensor)
            )
    for name in plan.cast:
        leaves[name] = leaves[name].astype(wanted[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


def open_safetensors(path: Path) -> Any:
    """Opens a file, whose header is checked, as a context manager with `keys` and `get_slice`.

    Raises:
      CheckpointError: it cannot be read.
    """
    library = _import_library("safetensors")
    try:
        return library.safe_open(path, framework="np")
    except (OSError, library.SafetensorError) as error:
        problem = Problem(str(path), f"cannot be read: {error}")
        fix = "a file that export_safetensors or another tool wrote"
        raise CheckpointError(format_problems("Nothing was imported.", [problem], fix)) from error


def _saved_leaf(tensor: Any) -> SavedLeaf:
    dtype = str(tensor.get_dtype())
    return SavedLeaf(tuple(tensor.get_shape()), DTYPES.get(dtype, dtype.lower()), "")


def _make_reader(tensor: Any) -> Any:
    dtype = jnp.dtype(_saved_leaf(tensor).dtype)
    # The index of a scalar is empty, which the library does not accept.
    return lambda index: np.asarray(tensor[index] if index else tensor[...]).astype(dtype)


def _import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        fix = "pip install 'shardkit[safetensors]'"
        raise CheckpointError.of("A package is missing.", name, "is not installed", fix) from error
