"""The training loop: what it shows, what it writes, and how the result is scored."""

from ._config import TrainConfig
from ._declare import batch_shapes, declare_run, decoder_model
from ._environment import package_versions
from ._plot import plot_runs
from ._replay import Replay, abstract_batch, replay
from ._sample import printable, sample_tokens
from ._scores import Result
from ._source import Source
from ._stop import Stopped
from ._text import held_out_bits
from ._text_config import TextTrainConfig
from ._train import train
from ._trainer import Trainer
from ._watch import Numbers, Run, Watcher

__all__ = [
    "Numbers",
    "Replay",
    "Result",
    "Run",
    "Source",
    "Stopped",
    "TextTrainConfig",
    "TrainConfig",
    "Trainer",
    "Watcher",
    "abstract_batch",
    "batch_shapes",
    "declare_run",
    "decoder_model",
    "held_out_bits",
    "package_versions",
    "plot_runs",
    "printable",
    "replay",
    "sample_tokens",
    "train",
]
