"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values.

With `use_sliding_window` the layers from `max_window_layers` on see a window; no released model
of the family uses it.
"""

from .._family import ModelFamily
from .._readers import read_rope, window_reader
from ._llama import ATTENTION, DEFAULTS, FIELDS, MLP, NORMS, OUTER, SILU

_BIASED = ("query", "key", "value")

QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=FIELDS,
    tensors={
        leaf: source
        for leaf, source in (OUTER | ATTENTION | MLP | NORMS).items()
        if not leaf.endswith("_bias") or leaf in {f"layers/{name}_bias" for name in _BIASED}
    },
    # Those of `Qwen2Config`, which released files may omit.
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    fixed=SILU | {"use_mrope": (False,)},
    constants={"bias": _BIASED},
    readers=(read_rope, window_reader("late")),
)
