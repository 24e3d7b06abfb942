"""Qwen3: queries and keys are normed per head, and heads have a width of their own."""

from .._family import ModelFamily
from .._readers import read_biases, read_rope, window_reader
from ._llama import ATTENTION, DEFAULTS, FIELDS, MLP, NORMS, OUTER, SILU

HEAD_NORMS = {
    "layers/query_norm": ("model.layers.{i}.self_attn.q_norm.weight", "h -> h"),
    "layers/key_norm": ("model.layers.{i}.self_attn.k_norm.weight", "h -> h"),
}
# Those of `Qwen3Config`, which released files may omit.
QWEN3_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN3 = ModelFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=FIELDS,
    tensors=OUTER | ATTENTION | HEAD_NORMS | MLP | NORMS,
    defaults=QWEN3_DEFAULTS,
    fixed=SILU,
    constants={"qk_norm": True},
    readers=(read_rope, read_biases, window_reader("late")),
)
