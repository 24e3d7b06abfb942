"""Small models whose batch lacks an axis that stores their weights, and images split by height.

As in `_misplaced_rules`, each has the code of the finding's fix, and the step with that code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ._misplaced import WIDTH
from ._misplaced_among import IMAGES, KERNELS, convolve, pin
from ._misplaced_rules import ROWS, SHAPES, odd_case

MANY = {"x": np.ones((128, 32, WIDTH), "f")}  # activations are larger than weights
FSDP, SHARD = {"data": 2, "fsdp": 4}, {"data": 2, "shard": 4}
BOTH = P(("data", "fsdp"))
FIX = "batch=sk.PathRules({\"x\": P(('data', 'fsdp'), None, None)}), which all other "


def weights_by_rows(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])  # weights_by_rows
    return jnp.mean((h @ p["down"]) ** 2)


def weights_by_features(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])  # weights_by_features
    return jnp.mean((h @ p["down"]) ** 2)


def weights_over_two_axes(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])  # weights_over_two_axes
    return jnp.mean((h @ p["down"]) ** 2)


def rows_beside_a_constraint(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])  # rows_beside_a_constraint
    return jnp.mean((pin(h, BOTH) @ p["down"]) ** 2)


def weights_by_one_rule(p, b, key):
    x = b["x"]
    for layer in p:
        q, k, v = (x @ layer[name]["kernel"] for name in "qkv")  # weights_by_one_rule
        q, k, v = (heads.reshape(*x.shape[:2], 8, 16) for heads in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(b["x"].shape)
        x = x + mixed @ layer["o"]["kernel"]
        x = x + jax.nn.gelu(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return jnp.mean(x**2)


def images_by_height(spec):
    def images_by_height(p, b, key):
        h = jax.nn.silu(convolve(b["x"], p["one"]))
        h = jax.nn.silu(convolve(h, p["two"]))
        h = pin(h, spec)  # images_by_height
        return jnp.mean((h.mean((1, 2)) @ p["head"]) ** 2)

    return images_by_height


_CHANNELS = {"one": (3, 3, 16, 64), "two": (3, 3, 64, 64), "head": (64, 16)}
_BY_CHANNELS = {"one": P(None, None, None, "tensor"), "two": P(None, None, "tensor"), "head": P()}
_lacking = functools.partial(
    odd_case, FIX, declared_by="the batch spec of batch/x", mended={"spec": BOTH}
)
_TWO_AXES = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
STORED = {
    "weights_by_rows": _lacking(
        weights_by_rows,
        SHAPES,
        {"*": P("fsdp")},
        MANY,
        mesh=FSDP,
        finding="dim_gather",
    ),
    "weights_by_features": _lacking(
        weights_by_features,
        SHAPES,
        {"up": P("fsdp"), "down": P(None, "fsdp")},
        MANY,
        mesh=FSDP,
        finding="split_contraction",
    ),
    "weights_over_two_axes": _lacking(
        weights_over_two_axes,
        SHAPES,
        _TWO_AXES,
        MANY,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        finding="split_contraction",
    ),
    "rows_beside_a_constraint": _lacking(
        rows_beside_a_constraint,
        SHAPES,
        {"*": P("fsdp")},
        MANY,
        mesh=FSDP,
        finding="activation_gather",
    ),
    "weights_by_one_rule": odd_case(
        "batch=sk.PathRules({\"x\": P(('data', 'shard'), None, None)}), which all other ",
        weights_by_one_rule,
        [KERNELS],
        {"**": P("shard")},
        MANY,
        mesh=SHARD,
        declared_by="the batch spec of batch/x",
        mended={"spec": P(("data", "shard"))},
        finding="dim_gather",
    ),
    "images_by_height": odd_case(
        "P('data', None, None, None) in the constraint at _misplaced_stored.py:",
        images_by_height(P("data", "tensor")),
        _CHANNELS,
        _BY_CHANNELS,
        {"x": IMAGES},
        declared_by="the constraint at",
        mended={"loss": images_by_height(ROWS)},
        finding="dim_gather",
    ),
}


def keys_of_few_heads(p, b, key):
    """Two heads of keys are divided by no axis of 4: they are whole, and nothing is wrong."""
    shape = *b["x"].shape[:2], -1, 16
    q, k, v = ((b["x"] @ p[name]).reshape(shape) for name in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v)
    return jnp.mean((mixed.reshape(b["x"].shape) @ p["o"]) ** 2)


_WHOLE = {"q": P(None, "tensor"), "k": P(), "v": P(), "o": P("tensor", None)}
_GROUPED = {"q": (WIDTH, WIDTH), "k": (WIDTH, 32), "v": (WIDTH, 32), "o": (WIDTH, WIDTH)}


def pair_by_the_other_dims(p, b, key):
    x = b["x"] @ p["stem"]
    x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
    return jnp.mean((x.mean(1) @ p["head"]) ** 2)


_STEM = {"stem": (WIDTH, WIDTH), **SHAPES, "head": (WIDTH, 16)}
_BY_STEM = {"stem": P(None, "tensor"), "head": P("tensor", None)}
# Nothing of these is at odds with all others.
RIGHT = {
    "keys of few heads": odd_case("", keys_of_few_heads, _GROUPED, _WHOLE, mended={}),
    "one convolution widens": odd_case(
        "", images_by_height(ROWS), _CHANNELS, _BY_CHANNELS, {"x": IMAGES}, mended={}
    ),
}
# What splits the dims of a pair the other way round: its fix names both.
SWAPPED = odd_case(
    "params=sk.first_match(sk.PathRules({\"up\": P(None, 'tensor'), \"down\": P('tensor', None)})",
    pair_by_the_other_dims,
    _STEM,
    {**_BY_STEM, "up": P("tensor", None), "down": P(None, "tensor")},
    mended={"rules": {**_BY_STEM, "up": P(None, "tensor"), "down": P("tensor", None)}},
)
