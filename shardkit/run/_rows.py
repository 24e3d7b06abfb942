"""The rows with which the metrics of a run begin and end."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from .._errors import ConfigError
from ._environment import environment
from ._folder import MetricsFile, read_metrics
from ._goodput import goodput, interruption
from ._stop import Stopped


def write_beginning(
    file: MetricsFile,
    mesh: Mesh,
    step: int | None,
    record: Mapping[str, Any],
    began: float,
    seconds: Mapping[str, float],
) -> None:
    """Writes how a run begins.

    Args:
      file: its metrics.
      mesh: devices.
      step: from which it goes on; None for a new run.
      record: settings.
      began: when this life of the run did, in seconds since 1970.
      seconds: what the time before was spent on.
    """
    spent = {**seconds, **interruption(file.before, file.void, began)}
    about = {**environment(mesh), "began": round(began, 3), "seconds": spent}
    if step is None:
        file.write("start", config=record, **about)
    else:
        file.write("resumed", step=step, **about)


@contextlib.contextmanager
def noted(file: MetricsFile) -> Iterator[None]:
    """Notes what the block raises."""
    try:
        yield
    except BaseException as error:
        why = {KeyboardInterrupt: "interrupted", Stopped: "told to stop"}
        # On a disk that is full the error counts, not that it could not be noted.
        with contextlib.suppress(ConfigError):
            file.write("stopped", why=why.get(type(error), str(error)))
        error.add_note(f"Metrics so far are in {file.path}.")
        raise


@contextlib.contextmanager
def summed(file: MetricsFile, console: Console) -> Iterator[None]:
    """Ends a run, however it does, with what its time was spent on, lives before included."""
    try:
        yield
    finally:
        spent = goodput(read_metrics(file.path.parent), time.time())
        with contextlib.suppress(ConfigError):
            file.write("goodput", **spent.row())
        console.print(spent.text(), highlight=False, soft_wrap=True)
