"""Mixtral: every layer is a mixture of experts, whose shares are scaled to sum to 1."""

from .._family import ModelFamily
from .._readers import check_shares, read_rope, window_reader
from ._llama import ATTENTION, DEFAULTS, FIELDS, NORMS, OUTER, SILU

_MIXTURE = "model.layers.{i}.block_sparse_moe."

MIXTRAL = ModelFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=FIELDS | {"num_local_experts": "experts", "num_experts_per_tok": "top_k"},
    tensors=OUTER
    | {leaf: source for leaf, source in ATTENTION.items() if not leaf.endswith("_bias")}
    | NORMS
    | {
        "layers/router": (_MIXTURE + "gate.weight", "x e -> e x"),
        "layers/expert_gate": (_MIXTURE + "experts.{j}.w1.weight", "f e -> e f"),
        "layers/expert_up": (_MIXTURE + "experts.{j}.w3.weight", "f e -> e f"),
        "layers/expert_down": (_MIXTURE + "experts.{j}.w2.weight", "e f -> f e"),
    },
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    fixed=SILU | {"output_router_logits": (False,), "router_jitter_noise": (0.0,)},
    constants={"balance_loss": 0.0, "router_z_loss": 0.0},
    readers=(read_rope, window_reader("all", by_type=False), check_shares),
)
