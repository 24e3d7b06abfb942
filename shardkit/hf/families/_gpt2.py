"""GPT-2: learned positions, LayerNorm, biases everywhere, and one tensor for q, k and v.

Its weights are stored [in, out], where all other families store [out, in].
"""

from .._family import ModelFamily
from .._readers import read_inner_width

_LAYER = "transformer.h.{i}."
_FUSED = {f"layers/{name}": f"{part}/3" for part, name in enumerate(("query", "key", "value"))}

GPT2 = ModelFamily(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": "vocab",
        "n_embd": "embed_dim",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_positions": "positions",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    tensors={
        "embedding": ("transformer.wte.weight", "v e -> v e"),
        "positions": ("transformer.wpe.weight", "p e -> p e"),
        "norm": ("transformer.ln_f.weight", "e -> e"),
        "norm_bias": ("transformer.ln_f.bias", "e -> e"),
        "head": ("lm_head.weight", "v e -> e v"),
        **{
            leaf: (_LAYER + "attn.c_attn.weight", f"e ({part} n h) -> e n h")
            for leaf, part in _FUSED.items()
        },
        **{
            f"{leaf}_bias": (_LAYER + "attn.c_attn.bias", f"({part} n h) -> n h")
            for leaf, part in _FUSED.items()
        },
        "layers/out": (_LAYER + "attn.c_proj.weight", "(n h) e -> n h e"),
        "layers/out_bias": (_LAYER + "attn.c_proj.bias", "e -> e"),
        "layers/up": (_LAYER + "mlp.c_fc.weight", "e f -> e f"),
        "layers/up_bias": (_LAYER + "mlp.c_fc.bias", "f -> f"),
        "layers/down": (_LAYER + "mlp.c_proj.weight", "f e -> f e"),
        "layers/down_bias": (_LAYER + "mlp.c_proj.bias", "e -> e"),
        "layers/attn_norm": (_LAYER + "ln_1.weight", "e -> e"),
        "layers/attn_norm_bias": (_LAYER + "ln_1.bias", "e -> e"),
        "layers/mlp_norm": (_LAYER + "ln_2.weight", "e -> e"),
        "layers/mlp_norm_bias": (_LAYER + "ln_2.bias", "e -> e"),
    },
    defaults={"n_inner": None, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": (False,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    constants={"norm": "layer", "activation": "gelu_tanh", "gated": False, "bias": True},
    readers=(read_inner_width,),
    # Dropout is the business of whoever trains; n_ctx repeats n_positions.
    ignored=("*_pdrop", "summary_*", "reorder_and_upcast_attn", "n_ctx"),
    prefix="transformer.",
    # Causal masks, which old files have as buffers.
    ignored_tensors=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)
