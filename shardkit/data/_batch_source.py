"""`BatchSource`: batches as a function of the step, with a state that is the step."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._core.errors import DataError, Problem, count, raise_all
from .._core.types import Batch
from ._config import DataConfig


@runtime_checkable
class BatchSource(Protocol):
    """Batches as a function of the step: `Text`, `Arrays`, `Dataset`, or your own.

    Its `str` names it in errors.
    """

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        ...

    def batch(self, step: int, rows: slice | np.ndarray = ...) -> Batch:
        """Returns some rows of the batch of a step: pytree of host arrays [n, ...]."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Returns `{"batch": step, ...}` as JSON values; the other entries identify the data."""
        ...


class ScoredSource(BatchSource, Protocol):
    """Tokens to train on and tokens to score: `Text` or `Examples`."""

    @property
    def config(self) -> DataConfig:
        """How they are cut into rows."""
        ...

    @property
    def unit(self) -> str:
        """What a token is: `byte` or `token`."""
        ...

    @property
    def validation_tokens(self) -> int:
        """Number of tokens that the validation batches score, each once."""
        ...

    @property
    def validation_bytes(self) -> int | None:
        """Bytes that they stand for; None if that is not known."""
        ...

    @property
    def validation_steps(self) -> int:
        """Number of validation batches."""
        ...

    def validation_batch(self, step: int, rows: slice | np.ndarray = ...) -> Batch:
        """Returns the validation batch of a step in `range(validation_steps)`."""
        ...

    def validation_weight(self, step: int) -> int:
        """Number of tokens that all rows of a validation batch score."""
        ...

    def describe(self) -> str:
        """Returns one line: what is read, and how much of it."""
        ...


def resume_step(state: Mapping[str, Any], data: BatchSource) -> int:
    """Returns the step at which data resumes, from the state that a checkpoint holds.

    Args:
      state: the result of `data.state(step)` when the checkpoint was made.
      data: the data to read now.

    Raises:
      DataError: the data is different; every difference is named: size, seed, tokenizer, contents.

    >>> from shardkit.data import Arrays
    >>> data = Arrays({"x": np.arange(6)}, rows=2)
    >>> resume_step(data.state(5), data)
    5
    """
    step = state.get("batch")
    now = data.state(step if isinstance(step, int) else 0)
    problems = [
        Problem(f"{data}: {name}", f"was {state.get(name)!r}, is {now.get(name)!r}")
        for name in {**now, **state}
        if state.get(name) != now.get(name)
    ]
    headline = f"The data differs from the checkpoint's: {count(len(problems), 'value')} changed."
    raise_all(DataError, headline, problems, "the data as it was, or a new run from step 0")
    return int(now["batch"])
