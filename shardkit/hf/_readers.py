"""Readers of what `config.json` spreads over several keys, in the forms of several years.

Each takes its keys out of the values and returns fields of `DecoderConfig`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ._family import Reader

FULL, SLIDING = "full_attention", "sliding_attention"
_LLAMA3 = {
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "length",
}


class Unread(Exception):
    """The value of a key is not computed; the message says why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


def read_rope(values: dict[str, Any]) -> Mapping[str, Any]:
    """Reads `rope_parameters`; or `rope_theta`, `rope_scaling` and `rope_local_base_freq`.

    >>> read_rope({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    {'rope_theta': 10000.0, 'rope_factor': 2.0}
    """
    theta = values.pop("rope_theta", 10_000.0)
    local = values.pop("rope_local_base_freq", None)
    scaling = values.pop("rope_scaling", None) or {}
    new = values.pop("rope_parameters", None) or {}
    if FULL in new or SLIDING in new:
        new, sliding = new.get(FULL, {}), dict(new.get(SLIDING, {}))
        local = sliding.pop("rope_theta", local)
        if sliding.pop("rope_type", "default") != "default" or sliding:
            raise Unread("rope_parameters.sliding_attention", f"is scaled: {sliding}")
    elif new and local is not None:
        raise Unread("rope_parameters", f"does not say which layers it is for: {new}")
    scaling = {"rope_type" if key == "type" else key: x for key, x in scaling.items()}
    for key, value in scaling.items() if new else ():
        # Which of the two transformers reads differs from version to version.
        if new.get(key) != value:
            raise Unread(
                f"rope_scaling.{key}", f"is {value!r}, in rope_parameters {new.get(key)!r}"
            )
    rope = {"rope_theta": theta, **scaling, **new}
    fields = {"rope_theta": float(rope.pop("rope_theta"))} | _read_scaling(rope)
    return fields | ({} if local is None else {"local_rope_theta": float(local)})


def _read_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    fields: dict[str, Any] = {}
    if kind not in ("default", "linear", "llama3"):
        raise Unread(f"rope_type={kind!r}", "is not computed; default, linear and llama3 are")
    try:
        if kind != "default":
            fields["rope_factor"] = float(rope.pop("factor"))
        if kind == "llama3":
            low, high, length = (rope.pop(key) for key in _LLAMA3)
            fields["rope_bands"] = (float(low), float(high), int(length))
    except (KeyError, TypeError, ValueError) as error:
        raise Unread(f"rope_type={kind!r}", f"lacks a number: {error}") from None
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if rope:
        raise Unread("rope_scaling", f"has what a rotation of kind {kind!r} does not: {rope}")
    return fields


def _read_window(
    values: dict[str, Any], otherwise: str, by_type: bool, periods: Sequence[str]
) -> Mapping[str, Any]:
    """Reads which layers see a window: from `layer_types`, else as the family does."""
    window = values.pop("sliding_window", None)
    if not values.pop("use_sliding_window", True):
        window = None
    first, number = values.pop("max_window_layers", 0), values.get("num_hidden_layers", 0)
    types = values.pop("layer_types", None) if by_type else None
    given = [values.pop(key, None) for key in periods]
    period = next(filter(None, given), {"every second": 2, "five of six": 6}.get(otherwise, 0))
    if types is not None:
        if unknown := sorted(set(types) - {FULL, SLIDING}):
            raise Unread("layer_types", f"has {', '.join(map(repr, unknown))}")
        if len(types) != number:
            raise Unread("layer_types", f"has {len(types)} entries for {number} layers")
        far = [i for i, kind in enumerate(types) if kind == FULL]
    elif period:
        far = [i for i in range(number) if (i + 1) % period == 0]
    else:
        far = [i for i in range(number) if otherwise == "late" and i < first]
    if window is None or len(far) == number:
        return {"local_rope_theta": None}  # that of layers with a window
    return {"window": window, "global_layers": tuple(far)}


def window_reader(otherwise: str, *, by_type: bool = True, periods: Sequence[str] = ()) -> Reader:
    """Returns a reader of the layers that see a window.

    Args:
      otherwise: which do where `layer_types` is absent: `"all"`, `"late"` for those from
        `max_window_layers` on, `"every second"`, or `"five of six"`.
      by_type: whether the family has `layer_types`.
      periods: keys of a number that takes the place of 2 or 6.

    >>> window_reader("every second")({"sliding_window": 8, "num_hidden_layers": 4})
    {'window': 8, 'global_layers': (1, 3)}
    """
    return functools.partial(_read_window, otherwise=otherwise, by_type=by_type, periods=periods)


def read_query_scale(values: dict[str, Any]) -> Mapping[str, Any]:
    """Reads `query_pre_attn_scalar`, whose inverse root multiplies the attention logits."""
    return {"query_scale": float(values.pop("query_pre_attn_scalar")) ** -0.5}


def read_embed_scale(values: dict[str, Any]) -> Mapping[str, Any]:
    """Gemma's embeddings are multiplied by the root of their width."""
    return {"embed_scale": float(values["hidden_size"]) ** 0.5}


def read_biases(values: dict[str, Any]) -> Mapping[str, Any]:
    """Reads `attention_bias` and `mlp_bias`."""
    attention = ("query", "key", "value", "out") if values.pop("attention_bias", False) else ()
    mlp = ("gate", "up", "down") if values.pop("mlp_bias", False) else ()
    return {"bias": attention + mlp or False}


def check_shares(values: dict[str, Any]) -> Mapping[str, Any]:
    """Refuses a share that is always 1: with one choice the decoder's is its probability."""
    if values.get("num_experts_per_tok") == 1 and values.get("norm_topk_prob", True):
        raise Unread("num_experts_per_tok=1", "with shares scaled to 1 is not computed")
    return {}


def read_inner_width(values: dict[str, Any]) -> Mapping[str, Any]:
    """Reads `n_inner`, of which None is four times the width of the stream."""
    return {"mlp_dim": values.pop("n_inner") or 4 * values["n_embd"]}
