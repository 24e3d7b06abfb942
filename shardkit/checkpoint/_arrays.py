"""Writes the arrays with Orbax; the only module here that uses it.

Each leaf is a zarr folder with plain chunks, so that a damaged file belongs to one named leaf and
any zarr reader can open it. The other modules do not rely on Orbax for correctness: they compare
dtypes, shapes and bits themselves.
"""

import logging
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from .._core.errors import CheckpointError, Problem, raise_all
from ._files import ARRAYS

# Chunks are read whole. A shard that was saved under another sharding overlaps chunks partly, so
# small chunks waste less reading; but every chunk is a file, so there must not be too many.
_CHUNK_BYTES, _MAX_CHUNKS = 2**21, 2**14
_STATE = "state"
_MAX_NAME = 255  # bytes of a file's name
# Orbax warns that a checkpoint without OCDBT has no OCDBT files. It also logs the traceback of
# errors that it raises; shardkit reports the raised error, once.
_NOISE = (
    "Skipping merge of OCDBT checkpoints",
    "TensorStore data files not found",
    "raised an exception",
    "exception was never retrieved",
)


def _is_useful(record: logging.LogRecord) -> bool:
    return not any(noise in str(record.msg) for noise in _NOISE)


def _import_orbax() -> Any:
    # Imported late: it takes longer to import than all of shardkit.
    import orbax.checkpoint.experimental.v1 as ocp

    for logger in map(logging.getLogger, ("absl", "asyncio")):
        if _is_useful not in logger.filters:
            logger.addFilter(_is_useful)
    return ocp


def _make_context(ocp: Any, total_bytes: int) -> Any:
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    saving.use_replica_parallel = False
    # The sharding file would hold device ids, which differ in the next run.
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    chunk = max(_CHUNK_BYTES, total_bytes // _MAX_CHUNKS)
    saving.storage_options.chunk_byte_size = chunk
    return context


def stored_name(path: str) -> str:
    """Returns a leaf's folder below the arrays: its path, with unsafe characters quoted."""
    return "/".join(map(_quote_key, path.split("/")))


def _quote_key(key: str) -> str:
    if set(key) <= {"."}:  # as folders ".", ".." and "" have another meaning
        return key.replace(".", "%2E") or "%"
    return urllib.parse.quote(key, safe="<>[]=,+")


def check_folders(leaves: Iterable[str]) -> None:
    """Refuses leaves whose folder has too long a name, or is inside the folder of another leaf.

    Dict keys with a `/` can cause the latter.

    Raises:
      CheckpointError: names all of them.
    """
    stored = {stored_name(path): path for path in leaves}
    problems = [
        Problem(path, f"would be stored among the files of {stored[above]}")
        for name, path in stored.items()
        for above in map(str, PurePosixPath(name).parents)
        if above in stored
    ]
    longest = {path: max(map(len, name.split("/"))) for name, path in stored.items()}
    problems += [
        Problem(path, f"would be a folder whose name has {n} bytes; files have at most {_MAX_NAME}")
        for path, n in longest.items()
        if n > _MAX_NAME
    ]
    fix = "shorter keys, of which no path begins with that of another leaf"
    raise_all(CheckpointError, "The state cannot be saved leaf by leaf.", problems, fix)


def leaf_folder(path: str) -> str:
    """Returns a leaf's folder below the folder of its step."""
    return f"{ARRAYS}/{_STATE}/{stored_name(path)}"


def leaf_of_file(name: str, paths: Mapping[str, Any]) -> str | None:
    """Returns the leaf that a file of the step belongs to; None for files about all leaves."""
    inside = name.split("/", 2)[-1]
    owners = [p for p in paths if inside.startswith(stored_name(p) + "/")]
    return max(owners, key=len) if owners else None


def start_writing(folder: Path, leaves: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Copies arrays to the host and starts writing them; the arrays may be donated afterwards.

    Returns:
      A function that waits until everything is written, and raises any error of writing.
    """
    ocp = _import_orbax()
    with _make_context(ocp, sum(x.nbytes for x in leaves.values())):
        response = ocp.save_async(str(folder), {stored_name(p): x for p, x in leaves.items()})
    return response.result
