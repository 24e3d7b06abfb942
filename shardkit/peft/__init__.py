"""Parameter-efficient fine-tuning: low-rank adapters, their files, frozen weights in few bits."""

from ._blocks import QuantizedLeaf
from ._factors import AdaptedLeaf
from ._files import module_names, name_modules
from ._lora import LoraModel, lora
from ._quantize import QuantizedModel, quantize

__all__ = [
    "AdaptedLeaf",
    "LoraModel",
    "QuantizedLeaf",
    "QuantizedModel",
    "lora",
    "module_names",
    "name_modules",
    "quantize",
]
