"""Several processes that save and restore one state: what one of them raises, all raise."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._core.errors import CheckpointCorruptedError, CheckpointError

_KINDS: dict[str, type[CheckpointError]] = {
    one.__name__: one for one in (CheckpointError, CheckpointCorruptedError)
}


def several() -> bool:
    """Whether there are other processes."""
    # In this order: to count processes starts JAX's devices, which may still be to be simulated.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that makes folders, writes manifests and deletes."""
    return not several() or jax.process_index() == 0


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Ends the block in all processes alike, once all have come to its end.

    Every process has to enter it, in its main thread.

    Raises:
      CheckpointError: that of the first process that raised one, so that none goes on alone.
    """
    if not several():
        yield
        return
    raised: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        raised = error
    said = _gathered("" if raised is None else f"{type(raised).__name__}\n{raised}")
    process = next((i for i, text in enumerate(said) if text), None)
    if process is None:
        return
    if raised is not None and process == jax.process_index():
        raise raised
    kind, _, message = said[process].partition("\n")
    raise _KINDS[kind](f"In process {process}: {message}")


def _gathered(text: str) -> list[str]:
    """What each process says; all that is sent in general is that nobody says anything."""
    words = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(words)], np.int32)))
    room = int(sizes.max())
    if not room:
        return [""] * len(sizes)
    padded = np.zeros(room, np.uint8)
    padded[: len(words)] = words
    all_words = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [
        row[:size].tobytes().decode() for row, size in zip(all_words, sizes.ravel(), strict=True)
    ]
