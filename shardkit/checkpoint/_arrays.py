"""The arrays themselves, written by Orbax; nothing else here knows of it.

Each leaf is a zarr folder of its own with plain chunks, so that a damaged file is a named leaf
and any zarr reader can open it. Every trap of the library that was measured is met above this
module: dtypes, shapes and bits are compared by us, before and after.
"""

import logging
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from .._core.errors import CheckpointError, Problem, raise_all
from ._files import ARRAYS

# A shard is read in whole chunks, and one that cuts across how the leaf was saved reads more than
# it holds unless chunks are small. Every chunk is a file, of which there are to be not too many.
_CHUNK_BYTES, _MOST_CHUNKS = 2**21, 2**14
_STATE = "state"
# Orbax warns that a checkpoint without its own container format has no such containers. What fails
# it logs with its traceback and raises as well; the error that is raised is told, once.
_NOISE = (
    "Skipping merge of OCDBT checkpoints",
    "TensorStore data files not found",
    "raised an exception",
    "exception was never retrieved",
)


def _quiet(record: logging.LogRecord) -> bool:
    return not any(noise in str(record.msg) for noise in _NOISE)


def _orbax() -> Any:
    # Imported by whoever saves or restores: it takes longer to import than all of shardkit.
    import orbax.checkpoint.experimental.v1 as ocp

    for logger in map(logging.getLogger, ("absl", "asyncio")):
        if _quiet not in logger.filters:
            logger.addFilter(_quiet)
    return ocp


def _context(ocp: Any, total_bytes: int) -> Any:
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    saving.use_replica_parallel = False
    # The sharding file would hold device ids, which mean nothing to the next run.
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    chunk = max(_CHUNK_BYTES, total_bytes // _MOST_CHUNKS)
    saving.storage_options.chunk_byte_size = chunk
    return context


def stored_name(path: str) -> str:
    """The folder of a leaf below the arrays: its path, with what file systems dislike quoted."""
    return "/".join(map(_quoted, path.split("/")))


def _quoted(key: str) -> str:
    if set(key) <= {"."}:  # the folders ".", ".." and "" would be other ones
        return key.replace(".", "%2E") or "%"
    return urllib.parse.quote(key, safe="<>[]=,+")


def check_folders(leaves: Iterable[str]) -> None:
    """Refuses leaves of which one would be stored inside the folder of another.

    Raises:
      CheckpointError: naming both; dict keys that hold `/` can do that.
    """
    stored = {stored_name(path): path for path in leaves}
    problems = [
        Problem(path, f"would be stored among the files of {stored[above]}")
        for name, path in stored.items()
        for above in map(str, PurePosixPath(name).parents)
        if above in stored
    ]
    fix = "rename one key, so that no leaf's path begins with that of another"
    raise_all(CheckpointError, "The state cannot be saved leaf by leaf.", problems, fix)


def leaf_folder(path: str) -> str:
    """Where a leaf is, below the folder of its step."""
    return f"{ARRAYS}/{_STATE}/{stored_name(path)}"


def leaf_of_file(name: str, paths: Mapping[str, Any]) -> str | None:
    """The leaf whose values a file of the step holds, or None for files about the whole."""
    inside = name.split("/", 2)[-1]
    owners = [p for p in paths if inside.startswith(stored_name(p) + "/")]
    return max(owners, key=len) if owners else None


def start_writing(folder: Path, leaves: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Copies arrays to the host and starts writing them; the arrays may be donated afterwards.

    Returns:
      A function that waits until everything is written, and raises what went wrong.
    """
    ocp = _orbax()
    with _context(ocp, sum(x.nbytes for x in leaves.values())):
        response = ocp.save_async(str(folder), {stored_name(p): x for p, x in leaves.items()})
    return response.result
