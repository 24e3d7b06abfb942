"""Gemma 2: soft-capped logits, a window in every second layer, and norms after each branch.

Norms store their scale minus 1, and embeddings are multiplied by the root of their width.
"""

from .._family import ModelFamily
from .._readers import read_biases, read_embed_scale, read_query_scale, read_rope, window_reader
from ._llama import ATTENTION, FIELDS, MLP, OUTER

_LAYER = "model.layers.{i}."
GEMMA_FIELDS = FIELDS | {
    "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "logit_softcap",
}
GEMMA_TENSORS = (
    {leaf: OUTER[leaf] for leaf in ("embedding", "norm", "head")}
    | ATTENTION
    | {leaf: source for leaf, source in MLP.items() if not leaf.endswith("_bias")}
    | {
        "layers/attn_norm": (_LAYER + "input_layernorm.weight", "e -> e"),
        "layers/attn_post_norm": (_LAYER + "post_attention_layernorm.weight", "e -> e"),
        "layers/mlp_norm": (_LAYER + "pre_feedforward_layernorm.weight", "e -> e"),
        "layers/mlp_post_norm": (_LAYER + "post_feedforward_layernorm.weight", "e -> e"),
    }
)
# Those of `Gemma2Config`, which released files may omit.
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA_FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    # An old name of the same, which the newer key replaces.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "attention_dropout": (0.0,),
    "use_bidirectional_attention": (False, None),
}
GEMMA_CONSTANTS = {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_tanh"}
GEMMA_READERS = (read_rope, read_biases, read_query_scale, read_embed_scale)

GEMMA2 = ModelFamily(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=GEMMA_FIELDS,
    tensors=GEMMA_TENSORS,
    defaults=GEMMA_DEFAULTS,
    fixed=GEMMA_FIXED,
    constants=GEMMA_CONSTANTS,
    readers=(*GEMMA_READERS, window_reader("every second")),
    ignored=("sliding_window_size",),  # which repeats sliding_window in some released files
)
