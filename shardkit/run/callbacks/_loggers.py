"""Metrics to TensorBoard and Weights & Biases, besides `metrics.jsonl`.

Each logger imports its package when the run starts, and is an extra of that name.
"""

import abc
import configparser
import importlib
import importlib.util
import math
import netrc
import os
import time
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._core.errors import (
    ConfigError,
    Problem,
    count,
    did_you_mean,
    first_line,
    format_problems,
    raise_all,
)
from ._callback import Callback, RunContext, StepMetrics


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError for unknown loggers, and for absent ones with the command to install."""
    problems = []
    for name in names:
        subject = f"train.loggers={name}"
        if name not in LOGGERS:
            why = f"is not one of {', '.join(LOGGERS)}.{did_you_mean(name, LOGGERS)}"
            problems.append(Problem(subject, why, f"--set train.loggers={','.join(LOGGERS)}"))
        elif importlib.util.find_spec(LOGGERS[name].package) is None:
            why = f"needs the package {LOGGERS[name].package}, which is not installed."
            problems.append(Problem(subject, why, f"pip install 'shardkit[{name}]'"))
        elif why := LOGGERS[name].login_problem(os.environ):
            problems.append(Problem(subject, why, LOGGERS[name].login))
    headline = f"Metrics cannot go to {count(len(problems), 'logger')}."
    raise_all(ConfigError, headline, problems, "metrics.jsonl is written in any case")


def make_loggers(names: Sequence[str]) -> list[Callback]:
    """Returns the callbacks of loggers that `check_loggers` accepted."""
    return [LOGGERS[name]() for name in names]


class _Logger(Callback):
    """Logs every number of an update as `train/NAME`, and of an evaluation as `eval/NAME`."""

    package: str
    login: str = ""

    @staticmethod
    def login_problem(environment: Mapping[str, str]) -> str:
        """Why a run cannot log without asking the user; "" if it can."""
        return ""

    def on_start(self, run: RunContext, state: Any) -> None:
        self._throughput = run.throughput
        self._open(run)

    def on_step(self, metrics: StepMetrics) -> None:
        times = {"seconds": metrics.seconds, "data_seconds": metrics.data_seconds}
        values = {**metrics.values, **times, **self._throughput.columns(metrics.seconds)}
        self._log(metrics.step, {f"train/{name}": value for name, value in values.items()})

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, {f"eval/{name}": value for name, value in values.items()})

    @abc.abstractmethod
    def _open(self, run: RunContext) -> None:
        """Imports the package and starts, or continues, the log of a run."""

    @abc.abstractmethod
    def _log(self, step: int, values: Mapping[str, float]) -> None: ...


class TensorBoardLogger(_Logger):
    """Event files in `tensorboard` in the run's folder."""

    package = "tensorboardX"

    def _open(self, run: RunContext) -> None:
        module = importlib.import_module(self.package)
        folder = str(run.folder / "tensorboard")
        # Events of later updates, which a resumed run makes again, are no longer shown.
        # Files are named by the second: without a suffix a run that goes on within the same one
        # would write over the file of the life before.
        self._writer = module.SummaryWriter(
            folder, purge_step=run.start + 1, filename_suffix=f".{time.time_ns()}"
        )

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_exit(self, error: BaseException | None) -> None:
        self._writer.close()


class WandBLogger(_Logger):
    """One Weights & Biases run, also when resumed; `WANDB_MODE=offline` needs no network."""

    package = "wandb"
    login = "wandb login; or WANDB_MODE=offline, and wandb sync later"

    @staticmethod
    def login_problem(environment: Mapping[str, str]) -> str:
        """Looks where wandb does, without its import or a connection."""
        keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
        if environment.get("WANDB_MODE", "online") not in ("online", "shared"):
            return ""
        if any(environment.get(key) for key in keys) or _is_offline() or _has_netrc(environment):
            return ""
        return "needs a login: there is neither WANDB_API_KEY nor an entry in ~/.netrc."

    def _open(self, run: RunContext) -> None:
        wandb = importlib.import_module(self.package)
        id_file = run.folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                id=id_file.read_text(),
                resume="allow",
                name=run.folder.name,
                dir=str(run.folder),
                settings=wandb.Settings(console="off"),  # the terminal shows the progress line
            )
        except Exception as error:  # a wrong key, a proxy, a service that is down
            problem = Problem("train.loggers=wandb", f"cannot start: {first_line(error)}")
            fix = f"{self.login}; or a run without --set train.loggers=wandb"
            raise ConfigError(
                format_problems("Metrics cannot go to wandb.", [problem], fix)
            ) from error
        # A resumed run makes some updates again, so the step is a metric like others here.
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._run.log({"step": step, **finite})

    def on_exit(self, error: BaseException | None) -> None:
        """Finishes the run there too, as failed after an error."""
        self._run.finish(exit_code=0 if error is None else 1)


def _is_offline() -> bool:
    """Whether `wandb offline` was called in this folder, or for this user."""
    files = configparser.ConfigParser()
    files.read([Path.home() / ".config" / "wandb" / "settings", Path("wandb") / "settings"])
    return files.get("default", "mode", fallback="online") in ("offline", "disabled")


def _has_netrc(environment: Mapping[str, str]) -> bool:
    """Whether the user's netrc has a password for the service."""
    url = environment.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        file = netrc.netrc(environment.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return file.authenticators(urllib.parse.urlsplit(url).hostname or "") is not None


LOGGERS: Mapping[str, type[_Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandBLogger}
