"""Small steps in which one rule, batch spec or constraint is at odds with all other declarations.

Each has the code of the finding's fix, and the step with that code in place.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced import SEQUENCES, WIDTH, Case

PAIR = {"up": P(None, "tensor"), "down": P("tensor", None)}
SHAPES = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
BY_HEADS = {**dict.fromkeys("qkv", P(None, "tensor")), "o": P("tensor")}
HEADS = {**dict.fromkeys("qkv", (WIDTH, 8, 16)), "o": (8, 16, WIDTH)}
LABELLED = {"x": SEQUENCES, "y": SEQUENCES}
ROWS = P("data")
_pin = jax.lax.with_sharding_constraint


def scale_among_matrices(p, b, key):
    x = b["x"] * jax.lax.rsqrt(jnp.mean(b["x"] ** 2, -1, keepdims=True) + 1e-6)
    x = x * p["scale"]  # scale_among_matrices
    return jnp.mean((jax.nn.gelu(x @ p["up"]) @ p["down"]) ** 2)


def bias_in_between(p, b, key):
    x = jax.nn.relu(b["x"] @ p["up"]) @ p["down"]
    x = x + p["bias"]  # bias_in_between
    return jnp.mean((jax.nn.relu(x @ p["up"]) @ p["down"]) ** 2)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        normed = self.norm(x)  # scales_of_two_layers
        return x + self.down(jax.nn.gelu(self.up(normed)))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


LAYERS = nnx.split(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))), nnx.Param)
LAYERED = {"**/up/**": PAIR["up"], "**/down/**": PAIR["down"]}


def scales_of_two_layers(p, b, key):
    return jnp.mean(nnx.merge(LAYERS[0], p)(b["x"]) ** 2)


def gate_of_another_dim(p, b, key):
    up = b["x"] @ p["up"]
    gate = b["x"] @ p["gate"]  # gate_of_another_dim
    return jnp.mean(((jax.nn.silu(gate) * up) @ p["down"]) ** 2)


def channels_of_a_scale(p, b, key):
    conv = jax.lax.conv_general_dilated
    dims = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    h = conv(b["x"], p["one"], **dims)
    h = h * p["gamma"]  # channels_of_a_scale
    return jnp.mean((conv(jax.nn.relu(h), p["two"], **dims) - b["x"]) ** 2)


def labels_by_features(p, b, key):
    y = jax.nn.gelu(b["x"] @ p["up"]) @ p["down"]
    return jnp.mean((y - b["y"]) ** 2)  # labels_by_features


def inputs_by_length(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])  # inputs_by_length
    return jnp.mean((h @ p["down"] - b["y"]) ** 2)


def mask_by_queries(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = jnp.where(b["mask"][:, None], scores, -1e9)  # mask_by_queries
    out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)


def length_behind_a_shift(spec):
    def length_behind_a_shift(p, b, key):
        x = _pin(b["x"], spec)  # length_behind_a_shift
        x = x + jnp.concatenate([x[:, 1:], x[:, :1]], 1)
        return jnp.mean((jax.nn.gelu(x @ p["up"]) @ p["down"]) ** 2)

    return length_behind_a_shift


def probabilities_by_queries(spec):
    def probabilities_by_queries(p, b, key):
        q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        scores = _pin(scores, P("data", "tensor", None, None))
        probs = _pin(jax.nn.softmax(scores), spec)  # probabilities_by_queries
        out = jnp.einsum("bhts,bshk->bthk", probs, v)
        return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)

    return probabilities_by_queries


def output_by_features(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v)
    return jnp.mean(jnp.einsum("bthk,hkd->btd", mixed, p["o"]) ** 2)  # output_by_features


def experts_by_inputs(p, b, key):
    weights = jax.nn.softmax(b["x"] @ p["gate"])
    h = jax.nn.gelu(jnp.einsum("btd,edm->betm", b["x"], p["up"]))  # experts_by_inputs
    return jnp.mean(jnp.einsum("betm,emd,bte->btd", h, p["down"], weights) ** 2)


def kernel_by_outputs(p, b, key):
    dims = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    h = jax.nn.relu(jax.lax.conv_general_dilated(b["x"], p["one"], (1, 1), **dims))
    h = jax.lax.conv_general_dilated(h, p["two"], (1, 1), **dims)  # kernel_by_outputs
    return jnp.mean(h**2)


@dataclasses.dataclass
class Odd:
    """A misplaced declaration, the code of its fix, and the same step with that code."""

    fix: str
    misplaced: Case
    mended: dict


def odd_case(fix, loss, shapes, rules, batch=None, spec=ROWS, *, mended, **more):
    case = Case(loss, shapes, rules, batch or {"x": SEQUENCES}, spec, **more)
    return Odd(fix, case, mended)


def first_rule(**rules):
    listed = ", ".join(f'"{path.replace("__", "/")}": {spec}' for path, spec in rules.items())
    return f"params=sk.first_match(sk.PathRules({{{listed}}}), strategy.params)"


_VECTOR = {**PAIR, "scale": P("tensor"), "bias": P("tensor")}
_INSIDE = {**PAIR, "gate": P("tensor", None)}
_SCALED = {"one": P(), "two": P(), "gamma": P("tensor")}
_FEATURES = {**BY_HEADS, "o": P(None, None, "tensor")}
_EXPERTS = {"gate": P(), "up": P(None, "tensor"), "down": P("tensor")}
_OUTPUTS = {"one": P(None, None, None, "tensor"), "two": P(None, None, None, "tensor")}
_PIN = "P('data', None, None) in the constraint at _misplaced_rules.py:"
ODD = {
    "scale_among_matrices": odd_case(
        first_rule(scale="P(None)"),
        scale_among_matrices,
        {**SHAPES, "scale": (WIDTH,)},
        _VECTOR,
        declared_by='PathRules["scale"] of params/scale',
        mended={"rules": {**_VECTOR, "scale": P()}},
        finding="dim_gather",
    ),
    "bias_in_between": odd_case(
        first_rule(bias="P(None)"),
        bias_in_between,
        {**SHAPES, "bias": (WIDTH,)},
        _VECTOR,
        declared_by='PathRules["bias"] of params/bias',
        mended={"rules": {**_VECTOR, "bias": P()}},
        finding="dim_gather",
    ),
    "scales_of_two_layers": odd_case(
        first_rule(
            blocks__0__norm__scale__value="P(None)", blocks__1__norm__scale__value="P(None)"
        ),
        scales_of_two_layers,
        {},
        {**LAYERED, "**/scale/**": P("tensor")},
        declared_by='PathRules["**/scale/**"] of params/blocks/0/norm/scale',
        init=lambda key: nnx.split(Layers(nnx.Rngs(key)), nnx.Param)[1],
        mended={"rules": {**LAYERED, "**/scale/**": P()}},
        finding="dim_gather",
    ),
    "gate_of_another_dim": odd_case(
        first_rule(gate="P(None, 'tensor')"),
        gate_of_another_dim,
        {**SHAPES, "gate": SHAPES["up"]},
        _INSIDE,
        declared_by='PathRules["gate"] of params/gate',
        mended={"rules": {**_INSIDE, "gate": P(None, "tensor")}},
        finding="product_gather",
    ),
    "channels_of_a_scale": odd_case(
        first_rule(gamma="P(None)"),
        channels_of_a_scale,
        {"one": (3, 3, 16, 32), "gamma": (32,), "two": (3, 3, 32, 16)},
        _SCALED,
        {"x": np.ones((8, 16, 16, 16), "f")},
        declared_by='PathRules["gamma"] of params/gamma',
        mended={"rules": {**_SCALED, "gamma": P()}},
        finding="split_contraction",
    ),
    "labels_by_features": odd_case(
        "batch=sk.PathRules({\"x\": P('data', None, None), \"y\": P('data', None, None)})",
        labels_by_features,
        SHAPES,
        PAIR,
        LABELLED,
        sk.PathRules({"x": ROWS, "y": P("data", None, "tensor")}),
        declared_by="the batch spec of batch/y",
        mended={"spec": ROWS},
        finding="dim_gather",
    ),
    "inputs_by_length": odd_case(
        "batch=sk.PathRules({\"x\": P('data', None, None), \"y\": P('data', None, None)})",
        inputs_by_length,
        SHAPES,
        PAIR,
        LABELLED,
        sk.PathRules({"x": P("data", "tensor"), "y": ROWS}),
        declared_by="the batch spec of batch/x",
        mended={"spec": ROWS},
        finding="split_contraction",
    ),
    "mask_by_queries": odd_case(
        "batch=sk.PathRules({\"mask\": P('data', None, None), \"x\": P('data', None, None)})",
        mask_by_queries,
        HEADS,
        BY_HEADS,
        {"x": SEQUENCES, "mask": np.ones((16, 32, 32), bool)},
        sk.PathRules({"x": ROWS, "mask": P("data", "tensor")}),
        declared_by="the batch spec of batch/mask",
        mended={"spec": ROWS},
        finding="dim_gather",
    ),
    "length_behind_a_shift": odd_case(
        _PIN,
        length_behind_a_shift(P("data", "tensor", None)),
        SHAPES,
        PAIR,
        declared_by="the constraint at",
        mended={"loss": length_behind_a_shift(P("data", None, None))},
        finding="split_contraction",
    ),
    "probabilities_by_queries": odd_case(
        "P('data', 'tensor', None, None) in the constraint at _misplaced_rules.py:",
        probabilities_by_queries(P("data", None, "tensor", None)),
        HEADS,
        BY_HEADS,
        declared_by="the constraint at",
        mended={"loss": probabilities_by_queries(P("data", "tensor", None, None))},
        finding="split_contraction",
    ),
    "output_by_features": odd_case(
        first_rule(o="P('tensor', None, None)"),
        output_by_features,
        HEADS,
        _FEATURES,
        declared_by='PathRules["o"] of params/o',
        mended={"rules": BY_HEADS},
        finding="split_contraction",
    ),
    "experts_by_inputs": odd_case(
        first_rule(up="P('tensor', None, None)"),
        experts_by_inputs,
        {"gate": (WIDTH, 4), "up": (4, WIDTH, 256), "down": (4, 256, WIDTH)},
        _EXPERTS,
        declared_by='PathRules["up"] of params/up',
        mended={"rules": {**_EXPERTS, "up": P("tensor")}},
        finding="product_gather",
    ),
    "kernel_by_outputs": odd_case(
        first_rule(two="P(None, None, 'tensor', None)"),
        kernel_by_outputs,
        {"one": (3, 3, 16, 32), "two": (3, 3, 32, 32)},
        _OUTPUTS,
        {"x": np.ones((8, 16, 16, 16), "f")},
        declared_by='PathRules["two"] of params/two',
        mended={"rules": {**_OUTPUTS, "two": P(None, None, "tensor", None)}},
        finding="product_gather",
    ),
}
