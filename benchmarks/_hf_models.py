"""Tiny `transformers` models of every family, randomly initialized, with golden logits.

    python benchmarks/_hf_models.py tests/data/hf

writes, for each family, the folder that `save_pretrained` makes and `golden.npz`: token ids,
logits, loss and some gradients, all f32, computed by torch on a CPU. Weights are drawn wide, and
norms and biases differ from their initial values, so that no part of a model is without effect.
"""

import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

ROWS, LENGTH, VOCAB = 4, 16, 98
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": 6, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "rope_parameters": GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "intermediate_size": 24}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 80,
            "tie_word_embeddings": True,
        },
    ),
}
# Besides all vectors: enough matrices to see each kind of product.
GRADIENTS = re.compile(
    r"embed_tokens|wpe|s\.1\..*(q_proj|o_proj|mlp.down|gate\.w|s\.2\.(w1|gate))|h\.1\.attn"
)
SPLIT = {"llama": "50KB"}


def make_model(family: str) -> Any:
    """Builds the model of a family, the same at every call."""
    torch.manual_seed(0)
    kind, changes = FAMILIES[family]
    sizes = SIZES if family != "gpt2" else {k: SIZES[k] for k in ("vocab_size",)}
    config = getattr(transformers, kind)(**{**sizes, **changes, "initializer_range": 0.2})
    if family == "gpt2":
        config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def run(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns logits, and loss and gradients of the mean next-token cross entropy.

    Gradients take the place of the weights: `save_pretrained` knows their names in files, which
    for mixtures are not those of the parameters.
    """
    inputs = torch.from_numpy(tokens.astype(np.int64))
    logits = model(inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), inputs[:, 1:].reshape(-1)
    )
    model.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        gradients = load_file(f"{folder}/model.safetensors")
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{
            f"gradient {name}": gradient
            for name, gradient in gradients.items()
            if gradient.ndim == 1 or GRADIENTS.search(name)
        },
    }


def main(root: pathlib.Path) -> None:
    """Writes the folders of all families."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    for family in FAMILIES:
        folder, model = root / family, make_model(family)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size=SPLIT.get(family, "1GB"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez(folder / "golden.npz", tokens=tokens, **run(model, tokens))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{family}: {size:,} bytes, {[path.name for path in sorted(folder.iterdir())]}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
