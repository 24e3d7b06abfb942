"""The watchers that look at the numbers of a run, as its config declares them."""

from ._agreeing import CheckReplicas
from ._config import TrainConfig
from ._finite import WatchFinite
from ._spiking import WatchSpikes
from ._watch import Watcher


def guards(config: TrainConfig) -> list[Watcher]:
    """Makes them; the ones that may end the run first."""
    replicas = [CheckReplicas(config)] if config.replica_check_every else []
    return [WatchFinite(config.skip_limit), *replicas, WatchSpikes()]
