"""Language models on text: the reference decoder trained, scored and sampled with `Trainer`."""

from ._config import TextTrainConfig
from ._declare import batch_shapes, compile_run, declare_run, decoder_model
from ._decoder import Decoder, parameter_count
from ._decoder_config import DecoderConfig
from ._generate import Generator
from ._lora import LoraConfig
from ._loss import decoder_loss
from ._mixture import router_statistics, swiglu
from ._sample import printable, sample_tokens
from ._scores import measure_bits_per_token
from ._sizes import SIZES
from ._summary import TrainResult
from ._train import train
from ._tuning import Pretrained, Tuning

__all__ = [
    "SIZES",
    "Decoder",
    "DecoderConfig",
    "Generator",
    "LoraConfig",
    "Pretrained",
    "TextTrainConfig",
    "TrainResult",
    "Tuning",
    "batch_shapes",
    "compile_run",
    "declare_run",
    "decoder_loss",
    "decoder_model",
    "measure_bits_per_token",
    "parameter_count",
    "printable",
    "router_statistics",
    "sample_tokens",
    "swiglu",
    "train",
]
