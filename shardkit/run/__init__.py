"""The training loop: what it shows, what it writes, and how the result is scored."""

from ._config import TrainConfig
from ._declare import batch_shapes, declare_run, decoder_model
from ._loop import held_out_bits, run_steps
from ._sample import printable, sample_bytes
from ._scores import Result
from ._stop import Stopped
from ._train import train

__all__ = [
    "Result",
    "Stopped",
    "TrainConfig",
    "batch_shapes",
    "declare_run",
    "decoder_model",
    "held_out_bits",
    "printable",
    "run_steps",
    "sample_bytes",
    "train",
]
