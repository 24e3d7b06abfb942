"""Which steps stay when a new one is complete."""

import dataclasses
from collections.abc import Mapping

from .._errors import CheckpointError, Problem, raise_all
from .._options import check_options


@dataclasses.dataclass(frozen=True)
class Keep:
    """A policy; a step stays if any part of it says so. The newest always stays.

    Attributes:
      last: how many of the newest steps.
      every: also each step that is a multiple of this; 0 for none.
      best: also the best steps by this metric of `save(metrics=...)`; None for none.
      best_count: how many of these.
      largest: whether a larger metric is the better one.

    >>> Keep(last=1, every=100).kept({100: {}, 150: {}, 180: {}})
    {100, 180}
    """

    last: int = 2
    every: int = 0
    best: str | None = None
    best_count: int = 1
    largest: bool = False

    def __post_init__(self) -> None:
        check_options(self, CheckpointError, "Checkpoints cannot be kept this way.", "Keep.")
        least = {"last": 1, "every": 0, "best_count": 1}
        problems = [
            Problem(f"Keep({name}={value})", f"must be at least {low}", f"Keep({name}={low})")
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]
        raise_all(CheckpointError, "Checkpoints cannot be kept this way.", problems)

    def kept(self, steps: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Returns the steps that stay.

        Args:
          steps: `{step: its metrics}` of all complete steps.
        """
        newest = sorted(steps)[-self.last :]
        regular = [step for step in steps if self.every and step % self.every == 0]
        scored = [step for step in steps if self.best in steps[step]]
        sign = -1.0 if self.largest else 1.0
        # Of equal scores the later step is the better one: it has seen more.
        ranked = sorted(scored, key=lambda step: (sign * steps[step][str(self.best)], -step))
        return {*newest, *regular, *ranked[: self.best_count]}
