"""Gemma 3, its language models: norms of queries and keys, and two kinds of layers.

Five of six layers see a window and rotate with a base of their own; the sixth sees all.
"""

from .._family import ModelFamily
from .._readers import window_reader
from ._gemma2 import (
    GEMMA_CONSTANTS,
    GEMMA_DEFAULTS,
    GEMMA_FIELDS,
    GEMMA_FIXED,
    GEMMA_READERS,
    GEMMA_TENSORS,
)
from ._qwen3 import HEAD_NORMS

# Which transformers reads, but does not compute in this family.
_CAP = "attn_logit_softcapping"
_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")

GEMMA3 = ModelFamily(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields={key: field for key, field in GEMMA_FIELDS.items() if key != _CAP},
    tensors=GEMMA_TENSORS | HEAD_NORMS,
    # Those of `Gemma3TextConfig`, which released files may omit.
    defaults=GEMMA_DEFAULTS
    | {
        _CAP: None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
    },
    fixed=GEMMA_FIXED | {_CAP: (None,)},
    constants=GEMMA_CONSTANTS | {"qk_norm": True},
    readers=(*GEMMA_READERS, window_reader("five of six", periods=_PERIODS)),
)
