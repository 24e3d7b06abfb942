"""The training loop: what it shows, what it writes, and how the result is scored."""

from ._config import TrainConfig
from ._declare import batch_shapes, declare_run, decoder_model
from ._loop import held_out_bits, run_steps
from ._sample import printable, sample_bytes
from ._train import Result, train

__all__ = [
    "Result",
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
