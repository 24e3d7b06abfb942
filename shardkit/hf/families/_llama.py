"""Llama 2, 3, 3.1, 3.2 and 3.3: the names that most families share."""

from .._family import ModelFamily
from .._readers import read_biases, read_rope

FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp_dim",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
SILU = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}

_LAYER = "model.layers.{i}."
OUTER = {
    "embedding": ("model.embed_tokens.weight", "v e -> v e"),
    "norm": ("model.norm.weight", "e -> e"),
    "head": ("lm_head.weight", "v e -> e v"),
}
ATTENTION = {
    "layers/query": (_LAYER + "self_attn.q_proj.weight", "(n h) e -> e n h"),
    "layers/key": (_LAYER + "self_attn.k_proj.weight", "(n h) e -> e n h"),
    "layers/value": (_LAYER + "self_attn.v_proj.weight", "(n h) e -> e n h"),
    "layers/out": (_LAYER + "self_attn.o_proj.weight", "e (n h) -> n h e"),
    "layers/query_bias": (_LAYER + "self_attn.q_proj.bias", "(n h) -> n h"),
    "layers/key_bias": (_LAYER + "self_attn.k_proj.bias", "(n h) -> n h"),
    "layers/value_bias": (_LAYER + "self_attn.v_proj.bias", "(n h) -> n h"),
    "layers/out_bias": (_LAYER + "self_attn.o_proj.bias", "e -> e"),
}
MLP = {
    "layers/gate": (_LAYER + "mlp.gate_proj.weight", "f e -> e f"),
    "layers/up": (_LAYER + "mlp.up_proj.weight", "f e -> e f"),
    "layers/down": (_LAYER + "mlp.down_proj.weight", "e f -> f e"),
    "layers/gate_bias": (_LAYER + "mlp.gate_proj.bias", "f -> f"),
    "layers/up_bias": (_LAYER + "mlp.up_proj.bias", "f -> f"),
    "layers/down_bias": (_LAYER + "mlp.down_proj.bias", "e -> e"),
}
NORMS = {
    "layers/attn_norm": (_LAYER + "input_layernorm.weight", "e -> e"),
    "layers/mlp_norm": (_LAYER + "post_attention_layernorm.weight", "e -> e"),
}

LLAMA = ModelFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=FIELDS,
    tensors=OUTER | ATTENTION | MLP | NORMS,
    defaults=DEFAULTS | {"rms_norm_eps": 1e-6},
    fixed=SILU | {"rope_interleaved": (False,)},
    ignored=("is_llama_config",),
    readers=(read_rope, read_biases),
)
