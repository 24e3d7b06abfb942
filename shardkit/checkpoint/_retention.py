"""`RetentionPolicy`: which checkpoints to keep when a new one is complete."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from .._core.errors import CheckpointError, Problem, raise_all
from .._core.options import check_options
from ._files import delete_step, list_steps, step_folder
from ._manifest import read_manifest


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """Keeps a checkpoint if any of its rules does. The newest one is always kept.

    Attributes:
      max_to_keep: number of the newest steps to keep.
      keep_period: also keep each step that is a multiple of this; 0 for none.
      best_to_keep: also keep this many of the best steps; 0 for none.
      best_metric: the metric of `save(metrics=...)` that ranks them; needed for `best_to_keep`.
      best_is_largest: whether a larger metric is better.

    >>> RetentionPolicy(max_to_keep=1, keep_period=100).select({100: {}, 150: {}, 180: {}})
    {100, 180}
    """

    max_to_keep: int = 2
    keep_period: int = 0
    best_to_keep: int = 0
    best_metric: str | None = None
    best_is_largest: bool = False

    def __post_init__(self) -> None:
        headline = "Checkpoints cannot be kept this way."
        check_options(self, CheckpointError, headline, "RetentionPolicy.")
        least = {"max_to_keep": 1, "keep_period": 0, "best_to_keep": 0}
        problems = [
            Problem(
                f"RetentionPolicy({name}={value})",
                f"must be at least {low}",
                f"RetentionPolicy({name}={low})",
            )
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]
        if (self.best_to_keep > 0) != (self.best_metric is not None):
            fields = f"best_to_keep={self.best_to_keep}, best_metric={self.best_metric!r}"
            why = "needs both a number of steps and the metric that ranks them, or neither"
            fix = f'RetentionPolicy(best_to_keep=1, best_metric="{self.best_metric or "loss"}")'
            problems.append(Problem(f"RetentionPolicy({fields})", why, fix))
        raise_all(CheckpointError, "The retention policy is not valid.", problems)

    def select(self, steps: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Returns the steps to keep.

        Args:
          steps: `{step: its metrics}` of all complete steps.
        """
        newest = sorted(steps)[-self.max_to_keep :]
        periodic = [step for step in steps if self.keep_period and step % self.keep_period == 0]
        scored = [step for step in steps if self.best_metric in steps[step]]
        sign = -1.0 if self.best_is_largest else 1.0
        # Of equal scores the later step is better: it was trained on more data.
        ranked = sorted(scored, key=lambda step: (sign * steps[step][str(self.best_metric)], -step))
        return {*newest, *periodic, *ranked[: self.best_to_keep]}


def delete_old_steps(root: Path, policy: RetentionPolicy) -> list[str]:
    """Deletes every complete step that the policy does not keep; returns what could not be.

    A step whose manifest cannot be read is kept.
    """
    scores = {}
    for step in list_steps(root):
        try:
            scores[step] = read_manifest(step_folder(root, step)).metrics
        except CheckpointError:
            continue
    old = sorted(set(scores) - policy.select(scores))
    return [message for step in old for message in delete_step(root, step)]
