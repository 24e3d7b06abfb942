"""Parameter-efficient fine-tuning: low-rank adapters, their files, frozen weights in few bits."""

from ._blocks import QuantizedLeaf as QuantizedLeaf
from ._factors import AdaptedLeaf as AdaptedLeaf
from ._files import module_names as module_names
from ._files import name_modules as name_modules
from ._lora import LoraModel as LoraModel
from ._lora import lora as lora
from ._quantize import QuantizedModel as QuantizedModel
from ._quantize import quantize as quantize
