"""The families of Hugging Face models that the reference decoder computes, one file each."""

from .._family import ModelFamily
from ._gemma2 import GEMMA2
from ._gemma3 import GEMMA3
from ._gpt2 import GPT2
from ._llama import LLAMA
from ._mistral import MISTRAL
from ._mixtral import MIXTRAL
from ._qwen2 import QWEN2
from ._qwen3 import QWEN3
from ._qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE, GPT2)
}

__all__ = ["FAMILIES"]
