"""What data is, for whoever trains on it: batches by step, and a position that is the step."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .._core.errors import DataError, Problem, count, raise_all


class Data(Protocol):
    """Batches as a function of the step: `Text`, `Arrays`, `Dataset`, or your own.

    Its `str` names it in errors.
    """

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        ...

    def batch(self, step: int, rows: slice | np.ndarray = ...) -> Any:
        """Returns rows of the batch of a step: pytree of host arrays [n, ...]."""
        ...

    def position(self, step: int) -> dict[str, Any]:
        """Returns `{"batch": step, ...}` as JSON values; the rest recognizes the data."""
        ...


def resume_step(position: Mapping[str, Any], data: Data) -> int:
    """Returns the step at which data goes on, from the position that a checkpoint holds.

    Args:
      position: what `data.position(step)` was when the checkpoint was made.
      data: what is to be read now.

    Raises:
      DataError: it is other data: naming all that differs, size, seed, tokenizer or contents.

    >>> from shardkit.data import arrays
    >>> data = arrays({"x": np.arange(6)}, rows=2)
    >>> resume_step(data.position(5), data)
    5
    """
    step = position.get("batch")
    now = data.position(step if isinstance(step, int) else 0)
    problems = [
        Problem(f"{data}: {name}", f"was {position.get(name)!r}, is {now.get(name)!r}")
        for name in {**now, **position}
        if position.get(name) != now.get(name)
    ]
    headline = f"The data is not what the checkpoint was made with: {count(len(problems), 'value')}"
    raise_all(DataError, f"{headline} changed.", problems, "the data as it was, or begin at step 0")
    return int(now["batch"])
