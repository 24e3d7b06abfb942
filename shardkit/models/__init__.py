"""Reference models in flax nnx; they name logical axes only."""

from ._attention import attention
from ._block import block, rms_norm, rotate, rotation
from ._config import DecoderConfig
from ._cross_entropy import cross_entropy
from ._decoder import Decoder, parameter_count
from ._experts import experts, route
from ._loss import decoder_loss
from ._mixture import expert_capacity, router_statistics, swiglu
from ._sizes import SIZES

__all__ = [
    "SIZES",
    "Decoder",
    "DecoderConfig",
    "attention",
    "block",
    "cross_entropy",
    "decoder_loss",
    "expert_capacity",
    "experts",
    "parameter_count",
    "rms_norm",
    "rotate",
    "rotation",
    "route",
    "router_statistics",
    "swiglu",
]
