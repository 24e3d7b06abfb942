"""The callbacks that every run has, in the order in which they are called."""

from rich.console import Console

from ...processes import ProcessGroup
from .._config import TrainConfig, check_profile, parse_check, parse_profile
from ._callback import Callback
from ._finite import FiniteCheck
from ._heartbeat import Heartbeat
from ._loggers import check_loggers, make_loggers
from ._profile import ProfileTrace
from ._progress import Describe, ProgressDisplay
from ._replica_check import BatchCheck, ReplicaCheck, SelfCheckCallback
from ._spikes import SpikeLog

# Updates between comparisons of the batches that several processes read.
_BATCH_CHECK_EVERY = 100


def check_callbacks(config: TrainConfig, start: int) -> None:
    """Raises ConfigError, before a compile, if a callback cannot do what the config asks.

    That is a logger that is unknown or not installed, or updates to trace that are over.
    """
    check_loggers(config.loggers)
    check_profile(config.profile, config.steps, start)


def default_callbacks(
    config: TrainConfig, describe: Describe, console: Console, process_group: ProcessGroup
) -> list[Callback]:
    """Returns the callbacks of a config: those that may end the run first, the progress last."""
    callbacks: list[Callback] = [Heartbeat(process_group), FiniteCheck(config.skip_limit)]
    if process_group.count > 1:
        callbacks.append(BatchCheck(config.replica_check_every or _BATCH_CHECK_EVERY))
    if config.replica_check_every:
        callbacks.append(ReplicaCheck(config.replica_check_every, config.on_replica_mismatch))
    if every := parse_check(config.check):
        callbacks.append(SelfCheckCallback(every, process_group))
    callbacks += [SpikeLog(), *make_loggers(config.loggers)]
    if config.profile is not None:
        callbacks.append(ProfileTrace(*parse_profile(config.profile, config.steps)))
    return [*callbacks, ProgressDisplay(console, config.log_every, describe)]
