"""Mistral: Llama's tensors, and a window in every layer where the config gives one.

Version 0.1 sees 4,096 tokens; later versions see all.
"""

from .._family import ModelFamily
from .._readers import read_rope, window_reader
from ._llama import ATTENTION, DEFAULTS, FIELDS, MLP, NORMS, OUTER, SILU

_WEIGHTS = {
    leaf: source
    for leaf, source in (OUTER | ATTENTION | MLP | NORMS).items()
    if not leaf.endswith("_bias")
}

MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=FIELDS,
    tensors=_WEIGHTS,
    defaults=DEFAULTS
    | {
        # Those of `MistralConfig`, which released files may omit.
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    fixed=SILU,
    readers=(read_rope, window_reader("all")),
)
