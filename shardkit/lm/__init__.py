"""Language models on text: the reference decoder trained, scored and sampled with `Trainer`."""

from ._config import TextTrainConfig
from ._declare import batch_shapes, compile_run, declare_run, decoder_model
from ._sample import printable, sample_tokens
from ._scores import measure_bits_per_token
from ._summary import TrainResult
from ._train import train

__all__ = [
    "TextTrainConfig",
    "TrainResult",
    "batch_shapes",
    "compile_run",
    "declare_run",
    "decoder_model",
    "measure_bits_per_token",
    "printable",
    "sample_tokens",
    "train",
]
