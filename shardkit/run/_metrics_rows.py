"""The rows with which each process of a run begins and ends its part of the metrics file."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from .._core.errors import ConfigError
from ._facts import environment
from ._goodput import goodput, interruption
from ._metrics_file import MetricsFile, read_metrics
from ._stop import Stopped


def write_start(
    metrics: MetricsFile,
    mesh: Mesh,
    step: int | None,
    *,
    record: Mapping[str, Any],
    began: float,
    seconds: Mapping[str, float],
) -> None:
    """Writes a `start` or, after updates already made, a `resumed` row.

    This process started the run at `began`, in seconds since 1970; `seconds` is what the time since
    then was spent on, by cause.
    """
    spent = {**seconds, **interruption(metrics.kept_rows, metrics.dropped_rows, began)}
    about = {**environment(mesh), "began": round(began, 3), "seconds": spent}
    if step is None:
        metrics.write("start", config=record, **about)
    else:
        metrics.write("resumed", step=step, **about)


@contextlib.contextmanager
def log_exception(metrics: MetricsFile) -> Iterator[None]:
    """Writes a `stopped` row for an exception of the block, and notes the file on it."""
    try:
        yield
    except BaseException as error:
        why = {KeyboardInterrupt: "interrupted", Stopped: "told to stop"}
        # On a full disk the exception matters, not that its row cannot be written.
        with contextlib.suppress(ConfigError):
            metrics.write("stopped", why=why.get(type(error), str(error)))
        error.add_note(f"Metrics so far are in {metrics.path}.")
        raise


@contextlib.contextmanager
def write_goodput(metrics: MetricsFile, console: Console) -> Iterator[None]:
    """Writes and prints what the time of all processes of the run was spent on, in any case."""
    try:
        yield
    finally:
        spent = goodput(read_metrics(metrics.path.parent), time.time())
        with contextlib.suppress(ConfigError):
            metrics.write("goodput", **spent.row())
        console.print(spent.text(), highlight=False, soft_wrap=True)
