"""`collective_errors`: an error in one process is raised in all that save or restore together."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._core import errors
from .._core.errors import ShardkitError


def has_several_processes() -> bool:
    """Whether the program runs in several processes."""
    # In this order: counting processes starts a backend, and devices may not be simulated yet.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
    """Whether this process creates folders, writes manifests and deletes."""
    return not has_several_processes() or jax.process_index() == 0


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Raises in every process if the block raises in one; waits for all at its end.

    Every process must enter it, in its main thread. The ShardkitError is that of the process with
    the lowest number that raised one.
    """
    if not has_several_processes():
        yield
        return
    raised: ShardkitError | None = None
    try:
        yield
    except ShardkitError as error:
        raised = error
    texts = _gather_texts("" if raised is None else f"{type(raised).__name__}\n{raised}")
    process = next((i for i, text in enumerate(texts) if text), None)
    if process is None:
        return
    if raised is not None and process == jax.process_index():
        raise raised
    kind, _, message = texts[process].partition("\n")
    raise getattr(errors, kind, ShardkitError)(f"In process {process}: {message}")


def share_text(text: str) -> str:
    """Returns the text of the first process, in all that save or restore together."""
    return _gather_texts(text)[0] if has_several_processes() else text


def _gather_texts(text: str) -> list[str]:
    """Returns the text of each process; if all are empty, only their sizes are sent."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(encoded)], np.int32)))
    longest = int(sizes.max())
    if not longest:
        return [""] * len(sizes)
    padded = np.zeros(longest, np.uint8)
    padded[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes.ravel(), strict=True)]
