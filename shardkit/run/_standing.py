"""The watchers that every run has, in the order in which they are told."""

from rich.console import Console

from ..processes import Peers
from ._config import TrainConfig
from ._guards import guards
from ._peers import TellPeers
from ._profile import Profile, check_profile, parse_profile
from ._progress import ShowProgress
from ._rate import Rate
from ._sinks import check_sinks, make_sinks
from ._source import Describe
from ._watch import Watcher


def check_standing(config: TrainConfig, start: int) -> None:
    """Refuses what a config asks of them and they cannot do, before anything is compiled.

    Args:
      config: of the run.
      start: updates that it has behind it.

    Raises:
      ConfigError: a sink is unknown or not installed, or updates to trace are past.
    """
    check_sinks(config.sinks)
    check_profile(config.profile, config.steps, start)


def standing(
    config: TrainConfig, rate: Rate, describe: Describe, console: Console, peers: Peers
) -> list[Watcher]:
    """Makes them: what may end the run is told first, what shows it last."""
    watchers = [TellPeers(peers), *guards(config), *make_sinks(config.sinks, rate.columns)]
    if config.profile is not None:
        watchers.append(Profile(*parse_profile(config.profile, config.steps)))
    return [*watchers, ShowProgress(console, config.log_every, describe, rate)]
