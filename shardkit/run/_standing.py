"""The watchers that every run has, in the order in which they are told."""

from rich.console import Console

from ._config import TrainConfig
from ._finite import StopAtNonFinite
from ._progress import ShowProgress
from ._rate import Rate
from ._source import Describe
from ._watch import Watcher


def standing(
    config: TrainConfig, rate: Rate, describe: Describe, console: Console
) -> list[Watcher]:
    """Makes them: what may end the run is told first, what shows it last."""
    return [StopAtNonFinite(), ShowProgress(console, config.log_every, describe, rate)]
