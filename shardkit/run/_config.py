"""`TrainConfig`: how long a run is, what it reports, and which checkpoints it keeps."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from .._core.errors import ConfigError, Problem, format_problems, raise_all
from .._core.io._files import path_problem
from .._core.options import check_options
from ..checkpoint import RetentionPolicy


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: number of updates.
      seed: of the parameters and of dropout; the order of the data has its own seed.
      eval_every: updates between evaluations, if there is something to evaluate; one more is made
        after the last update. 0 for none.
      log_every: updates between printed lines when the output is not a terminal.
      checkpoint_every: updates between checkpoints; one more is always made at the end. 0 for no
        checkpoints at all.
      max_to_keep: how many of the newest checkpoints to keep.
      keep_period: also keep each checkpoint whose step is a multiple of this; 0 for none.
      best_to_keep: also keep this many checkpoints with the lowest validation bits per byte; an
        evaluation must fall on their step.
      resume: `auto` resumes the newest unfinished run of that name with the same settings, or a
        finished one that now has more `steps`, or starts a new one; `never` starts a new one;
        anything else is the folder of the run to resume.
      resume_with: names or groups of settings (`optimizer`, `train.seed`, `data`) that may differ
        from those of the run that resumes. Without them `auto` starts a new run, and a named run
        is refused, with a list of what differs.
      on_damage: what a resumed run does when its newest checkpoint is damaged: warn and take the
        `previous` intact one, or `stop`.
      on_save_error: what to do when a checkpoint or a row of metrics cannot be written: `stop`,
        or warn and `continue`, and fail at the end if the last checkpoint is missing.
      loggers: where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`; each is an extra.
      profile: updates to trace with `jax.profiler`, as `first:last`, e.g. `10:15`; None for none.
      step_timeout: seconds without an update, an evaluation or a save after which a process
        counts as stuck; then all processes end and say which one it was. 0 for no limit. The
        longest evaluation, with its compilation, must fit.
      skip_limit: updates in a row that may be skipped because their loss or gradients are not
        finite (`compile.on_nonfinite=skip`) before the run ends with an error.
      check: when `step.self_check` proves the compiled gradient, which needs no single device:
        before the `first` update of a process, before `every N` updates and the first, or `off`.
        A failure ends the run. A resumed run whose executable comes from a file, and has passed
        this run's check, starts without.
      replica_check_every: updates between checksum comparisons of the copies of the state on
        different devices; 0 for none.
      on_replica_mismatch: what to do when copies differ: `stop`, or warn and `continue`.
    """

    steps: int = 400
    seed: int = 0
    eval_every: int = 100
    log_every: int = 20
    checkpoint_every: int = 100
    max_to_keep: int = 2
    keep_period: int = 0
    best_to_keep: int = 0
    resume: Literal["auto", "never"] | str = "auto"
    resume_with: tuple[str, ...] = ()
    on_damage: Literal["previous", "stop"] = "previous"
    on_save_error: Literal["stop", "continue"] = "stop"
    loggers: tuple[str, ...] = ()
    profile: str | None = None
    step_timeout: float = 0.0
    skip_limit: int = 20
    check: Literal["first", "off"] | str = "first"
    replica_check_every: int = 0
    on_replica_mismatch: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        """Raises one ConfigError with every field that is out of range."""
        headline = "The training loop cannot run with these values."
        check_options(self, ConfigError, headline, "train.")
        raise_all(ConfigError, headline, self._problems())
        check_profile(self.profile, self.steps, 0)
        parse_check(self.check)

    @property
    def retention(self) -> RetentionPolicy:
        """Which checkpoints stay, as the three fields declare."""
        return RetentionPolicy(
            max_to_keep=self.max_to_keep,
            keep_period=self.keep_period,
            best_to_keep=self.best_to_keep,
            best_metric="bits_per_byte" if self.best_to_keep else None,
        )

    def _problems(self) -> list[Problem]:
        """Fields that are out of range; a subclass adds its own."""
        least = {"steps": 1, "eval_every": 0, "log_every": 1, "checkpoint_every": 0}
        least |= {"max_to_keep": 1, "keep_period": 0, "best_to_keep": 0}
        least |= {"skip_limit": 1, "replica_check_every": 0}
        problems = [*self._check_least(least), *self._check_paths("resume")]
        if self.step_timeout < 0:
            why, fix = "must be 0 or more seconds.", "--set train.step_timeout=600"
            problems.append(Problem(f"train.step_timeout={self.step_timeout:g}", why, fix))
        return problems

    def _check_paths(self, *names: str) -> list[Problem]:
        paths = {name: getattr(self, name) for name in names}
        found = (path_problem(x, f"train.{n}={x}") for n, x in paths.items() if x is not None)
        return [problem for problem in found if problem]

    def _check_least(self, least: Mapping[str, int]) -> list[Problem]:
        return [
            Problem(
                f"train.{name}={value}", f"must be at least {low}.", f"--set train.{name}={low}"
            )
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]


def parse_check(text: str) -> float:
    """Parses `train.check`: updates between two self checks, infinite for `first`, 0 for `off`.

    Raises ConfigError if the text is none of `off`, `first` and `every N`.

    >>> parse_check("first"), parse_check("every 100"), parse_check("off")
    (inf, 100.0, 0.0)
    """
    if text in ("off", "first"):
        return math.inf if text == "first" else 0.0
    match = re.fullmatch(r"every ([1-9]\d*)", text.strip())
    if match is None:
        why = "is not 'off', 'first' or 'every N' with a number N of updates."
        problem = Problem(f"train.check={text!r}", why, '--set train.check="every 100"')
        headline = "The training loop cannot run with these values."
        raise ConfigError(format_problems(headline, [problem]))
    return float(match[1])


def parse_profile(text: str, steps: int) -> tuple[int, int]:
    """Parses `first:last`, the first and the last update to trace, counted from 1.

    Raises:
      ConfigError: the text is not a range, or the run of `steps` updates does not make them all.

    >>> parse_profile("10:15", 400)
    (10, 15)
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    why = None
    if match is None:
        why = "is not a range of updates first:last."
    elif first < 1:
        why = "begins before the first update, which is 1."
    elif last < first:
        why = f"ends before it begins: {last} < {first}."
    elif last > steps:
        why = f"ends after the last update, train.steps={steps}."
    if why is not None:
        raise _profile_error(text, why, f"--profile {_example_range(0, steps)}")
    return first, last


def check_profile(text: str | None, steps: int, start: int) -> None:
    """Raises ConfigError for a range of updates that a run resumed after `start` has made."""
    if text is not None and parse_profile(text, steps)[1] <= start:
        why = f"is over: the run resumes from update {start}."
        fix = f"--profile {_example_range(start, steps)}, or train.resume=never"
        raise _profile_error(text, why, fix)


def _example_range(start: int, steps: int) -> str:
    return f"{min(start + 10, steps)}:{min(start + 15, steps)}"


def _profile_error(text: str, why: str, fix: str) -> ConfigError:
    return ConfigError.of("These updates cannot be traced.", f"profile={text}", why, fix)
