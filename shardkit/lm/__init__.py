"""Language models on text: the reference decoder trained, scored and sampled with `Trainer`."""

from ._config import TextTrainConfig as TextTrainConfig
from ._declare import batch_shapes as batch_shapes
from ._declare import compile_run as compile_run
from ._declare import declare_run as declare_run
from ._declare import decoder_model as decoder_model
from ._decoder import Decoder as Decoder
from ._decoder import parameter_count as parameter_count
from ._decoder_config import DecoderConfig as DecoderConfig
from ._generate import Generator as Generator
from ._lora import LoraConfig as LoraConfig
from ._loss import decoder_loss as decoder_loss
from ._mixture import router_statistics as router_statistics
from ._mixture import swiglu as swiglu
from ._sample import printable as printable
from ._sample import sample_tokens as sample_tokens
from ._scores import measure_bits_per_token as measure_bits_per_token
from ._sizes import SIZES as SIZES
from ._summary import TrainResult as TrainResult
from ._train import train as train
from ._tuning import Pretrained as Pretrained
from ._tuning import Tuning as Tuning
