"""Qwen3-MoE: every layer is a mixture, whose shares are scaled where the config says so."""

from .._family import ModelFamily
from .._readers import check_shares, read_biases, read_rope, window_reader
from ._llama import ATTENTION, FIELDS, NORMS, OUTER, SILU
from ._qwen3 import HEAD_NORMS, QWEN3_DEFAULTS

_EXPERT = "model.layers.{i}.mlp.experts.{j}."

QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=FIELDS
    | {
        "num_experts": "experts",
        "num_experts_per_tok": "top_k",
        "moe_intermediate_size": "expert_mlp",
        "norm_topk_prob": "normalize_shares",
    },
    tensors=OUTER
    | ATTENTION
    | HEAD_NORMS
    | NORMS
    | {
        "layers/router": ("model.layers.{i}.mlp.gate.weight", "x e -> e x"),
        "layers/expert_gate": (_EXPERT + "gate_proj.weight", "f e -> e f"),
        "layers/expert_up": (_EXPERT + "up_proj.weight", "f e -> e f"),
        "layers/expert_down": (_EXPERT + "down_proj.weight", "e f -> f e"),
    },
    defaults=QWEN3_DEFAULTS | {"num_key_value_heads": 4, "head_dim": None, "norm_topk_prob": False},
    fixed=SILU
    | {
        "output_router_logits": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    constants={"qk_norm": True, "balance_loss": 0.0, "router_z_loss": 0.0},
    readers=(read_rope, read_biases, window_reader("all", by_type=False), check_shares),
    aliases={"num_local_experts": "num_experts"},
)
