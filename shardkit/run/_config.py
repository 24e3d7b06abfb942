"""How long a run is, what it says on the way, and what it keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from .._errors import ConfigError, Problem, raise_all
from .._options import check_options
from ._profile import check_profile


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: updates.
      seed: of the parameters and of dropout; the order of the data has its own.
      eval_every: updates between evaluations on the way, where there is something to evaluate;
        0 for none.
      log_every: updates between two printed lines where the output is no terminal.
      checkpoint_every: updates between checkpoints, of which one is always made at the end; 0
        for none at all.
      keep: how many of the newest checkpoints stay.
      keep_every: also every checkpoint of a step that this divides; 0 for none.
      keep_best: also so many with the fewest held-out bits per byte; an evaluation must fall on
        their step.
      resume: `auto` goes on with the newest unfinished run of that name and the same settings,
        and begins a new one where there is none; `never` begins a new one; anything else is the
        folder of the run to go on with.
      on_damage: what a resumed run does when its newest checkpoint is damaged: go on from the
        `previous` whole one, which it says, or `stop`.
      on_save_error: what a run does when a checkpoint or a row of metrics cannot be written:
        `stop`, or `go_on` without it, say so, and end with an error if the last checkpoint was
        lost.
      sinks: where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`; each is an extra.
      profile: updates to trace with `jax.profiler`, `10:15`; None for none.
      step_timeout: seconds without an update, an evaluation or a save after which a process
        counts as stuck: it and all others end, and say which; 0 for no limit. The longest
        evaluation, its compile included, has to fit.
      skip_limit: updates in a row that may be skipped because their loss or gradients are not
        finite (`compile.on_nonfinite=skip`); then the run ends with an error.
      replica_check_every: updates between two comparisons of the copies of the state that
        devices hold, by checksum; 0 for none.
      on_replica_mismatch: what a run does when copies differ: `stop`, or `go_on` and say so.
    """

    steps: int = 400
    seed: int = 0
    eval_every: int = 100
    log_every: int = 20
    checkpoint_every: int = 100
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    resume: str = "auto"
    on_damage: Literal["previous", "stop"] = "previous"
    on_save_error: Literal["stop", "go_on"] = "stop"
    sinks: tuple[str, ...] = ()
    profile: str | None = None
    step_timeout: float = 0.0
    skip_limit: int = 20
    replica_check_every: int = 0
    on_replica_mismatch: Literal["stop", "go_on"] = "stop"

    def __post_init__(self) -> None:
        """Refuses counts that no loop has."""
        check_options(self, ConfigError, "The loop cannot run this way.", "train.")
        raise_all(ConfigError, "The loop cannot run this way.", self._problems())
        check_profile(self.profile, self.steps, 0)

    def _problems(self) -> list[Problem]:
        """What is wrong with the fields, a subclass's own among them."""
        least = {"steps": 1, "eval_every": 0, "log_every": 1, "checkpoint_every": 0}
        least |= {"keep": 1, "keep_every": 0, "keep_best": 0}
        least |= {"skip_limit": 1, "replica_check_every": 0}
        problems = self._too_small(least)
        if self.step_timeout < 0:
            why, fix = "must be 0 or more seconds.", "--set train.step_timeout=600"
            problems.append(Problem(f"train.step_timeout={self.step_timeout:g}", why, fix))
        return problems

    def _too_small(self, least: Mapping[str, int]) -> list[Problem]:
        return [
            Problem(
                f"train.{name}={value}", f"must be at least {low}.", f"--set train.{name}={low}"
            )
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]
