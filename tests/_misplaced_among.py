"""Small models in which one declaration among several of its kind is misplaced.

As in `_misplaced_rules`, each has the code of the finding's fix, and the step with that code. What
is hard is to tell it from the others: two matrices that disagree can both be changed, a matrix that
is whole disagrees with nobody, two leaves have one rule, one constraint is like another.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced import SEQUENCES, WIDTH
from ._misplaced_rules import BY_HEADS, HEADS, PAIR, ROWS, SHAPES, first_rule, odd_case

pin = jax.lax.with_sharding_constraint
LENGTH, VOCAB = 32, 256
COLUMN, ROW = P(None, "tensor"), P("tensor", None)
TOKENS = np.zeros((16, LENGTH), "i")
CLASSED = {"x": SEQUENCES, "labels": TOKENS}
BY_QUERIES, BY_KEYS = P("data", None, "tensor"), P("data", None, None, "tensor")
AT = "in the constraint at _misplaced_among.py:"


def gate_among_three(p, b, key):
    up, x = b["x"] @ p["up"], b["x"]
    x = x + (jax.nn.silu(x @ p["gate"]) * up) @ p["down"]  # gate_among_three
    return jnp.mean((x @ p["head"]) ** 2)


def head_by_rows(p, b, key):
    x = b["x"] + jax.nn.gelu(b["x"] @ p["up"]) @ p["down"]
    logits = x @ p["head"]  # head_by_rows
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])


def labels_over_another_axis(p, b, key):
    logits = jax.nn.gelu(b["x"] @ p["up"]) @ p["down"] @ p["head"]
    logits, labels = jax.nn.log_softmax(logits), b["labels"]
    labels = labels[..., None]  # labels_over_another_axis
    return -jnp.mean(jnp.take_along_axis(logits, labels, -1))


def rotation_by_length(p, b, key):
    cos, sin = (b[name][:, None] for name in ("cos", "sin"))  # rotation_by_length
    q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
    q, k = (x * cos + jnp.concatenate([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k))
    out = jax.nn.dot_product_attention(q, k, v)
    return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)


def output_within_heads(spec):
    def output_within_heads(p, b, key):
        q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v)
        out = pin(out, spec)  # output_within_heads
        return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)

    return output_within_heads


convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def depthwise_by_channels(p, b, key):
    x = convolve(b["x"], p["stem"])
    h = convolve(x, p["dw"], feature_group_count=64)  # depthwise_by_channels
    return jnp.mean((x + jax.nn.gelu(h @ p["up"]) @ p["down"]) ** 2)


def targets_by_height(p, b, key):
    out = convolve(jax.nn.silu(convolve(b["x"], p["one"])), p["two"])
    return jnp.mean((out - b["y"]) ** 2)  # targets_by_height


def experts_whole(spec):
    def experts_whole(p, b, key):
        gates = jax.nn.softmax(b["x"] @ p["router"])
        h = jax.nn.silu(jnp.einsum("btd,edf->ebtf", b["x"], p["up"]))
        out = jnp.einsum("ebtf,efd->ebtd", h, p["down"])
        out = pin(out, spec)  # experts_whole
        return jnp.mean(jnp.einsum("ebtd,bte->btd", out, gates) ** 2)

    return experts_whole


def statistics_split(p, b, key, state):
    h = b["x"] @ p["up"]
    mean = 0.9 * state["mean"] + 0.1 * h.mean((0, 1))  # statistics_split
    h = jax.nn.gelu(h - h.mean((0, 1)))
    return jnp.mean((h @ p["down"] - b["x"]) ** 2), {}, {"mean": mean}


def averaged_with_its_parameter(p, b, key, state):
    average = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, state, p)
    h = jax.nn.gelu(b["x"] @ p["up"])
    out = h @ p["down"]  # averaged_with_its_parameter
    return jnp.mean((out - b["x"]) ** 2), {}, average


def scale_and_offset(p, b, key):
    x = b["x"] * jax.lax.rsqrt(jnp.mean(b["x"] ** 2, -1, keepdims=True) + 1e-6)
    x = x * p["norm"]["scale"] + p["norm"]["offset"]  # scale_and_offset
    return jnp.mean((jax.nn.gelu(x @ p["up"]) @ p["down"]) ** 2)


def down_beside_constraints(p, b, key):
    h = sk.nn.constrain(jax.nn.gelu(b["x"] @ p["up"]), "batch", None, "mlp")
    out = h @ p["down"]  # down_beside_constraints
    return jnp.mean(sk.nn.constrain(out, "batch", None, None) ** 2)


def one_of_two_constraints(spec):
    def one_of_two_constraints(p, b, key):
        q, k, v = (jnp.einsum("btd,dhk->bhtk", b["x"], p[name]) for name in "qkv")
        scores = pin(q @ k.swapaxes(2, 3), ROWS)
        probs = pin(jax.nn.softmax(scores, -1), spec)  # one_of_two_constraints
        return jnp.mean(jnp.einsum("bhtk,hkd->btd", probs @ v, p["o"]) ** 2)

    return one_of_two_constraints


def axes_in_another_order(spec):
    def axes_in_another_order(p, b, key):
        h = jax.nn.gelu(b["x"] @ p["up"])
        h = pin(h, spec)  # axes_in_another_order
        return jnp.mean((h @ p["down"]) ** 2)

    return axes_in_another_order


def kernels_by_columns(p, b, key):
    x = b["x"]
    for layer in p["layers"]:
        q, k, v = ((x @ layer[name]["kernel"]).reshape(16, LENGTH, 8, 16) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + mixed @ layer["o"]["kernel"]
        up = jax.nn.gelu(x @ layer["up"]["kernel"])
        x = x + up @ layer["down"]["kernel"]  # kernels_by_columns
    return jnp.mean((x @ p["head"]["kernel"]) ** 2)


def _learned(key, **more):
    weights = {name: jax.random.normal(key, shape) for name, shape in SHAPES.items()}
    return sk.Variables(weights, more or {name: w + 0 for name, w in weights.items()})


def _stateful(loss):
    return sk.Loss(loss, loss, stateful=True)


IMAGES = np.ones((8, 16, 16, 16), "f")
_GATED = {**SHAPES, "gate": SHAPES["up"], "head": (WIDTH, VOCAB)}
_GATES = {**PAIR, "gate": ROW, "head": COLUMN}
_HEADED, _HEAD = {**SHAPES, "head": (WIDTH, VOCAB)}, {**PAIR, "head": COLUMN}
_DEPTHWISE = {"stem": (3, 3, 16, 64), "dw": (7, 7, 1, 64), "up": (64, 256), "down": (256, 64)}
_CHANNELS = {"stem": P(), "dw": P(None, None, None, "tensor"), **PAIR}
_EXPERTS = {"router": (WIDTH, 8), "up": (8, WIDTH, 64), "down": (8, 64, WIDTH)}
_BY_EXPERTS = {"router": P(), "up": P("tensor"), "down": P("tensor")}
_NORMED = {**PAIR, "norm/*": P("tensor")}
_COLUMNS = {"up": COLUMN, "down": COLUMN}
_ANGLES = {name: np.ones((LENGTH, 16), "f") for name in ("cos", "sin")}
_LAYER = {**dict.fromkeys("qkvo", (WIDTH, WIDTH)), **SHAPES}
KERNELS = {name: {"kernel": shape} for name, shape in _LAYER.items()}
_STACKED = {"layers": [KERNELS, KERNELS], "head": {"kernel": (WIDTH, VOCAB)}}
_ROWS_OF = {f"**/{name}/kernel": ROW for name in ("o", "down")}
_WHOLE = {**dict.fromkeys("qkvo", P())}
AMONG = {
    "gate_among_three": odd_case(
        first_rule(gate="P(None, 'tensor')"),
        gate_among_three,
        _GATED,
        _GATES,
        declared_by='PathRules["gate"] of params/gate',
        mended={"rules": {**_GATES, "gate": COLUMN}},
        finding="product_gather",
    ),
    "head_by_rows": odd_case(
        first_rule(head="P(None, 'tensor')"),
        head_by_rows,
        _HEADED,
        {**PAIR, "head": ROW},
        declared_by='PathRules["head"] of params/head',
        mended={"rules": _HEAD},
        finding="split_contraction",
    ),
    "labels_over_another_axis": odd_case(
        "batch=sk.PathRules({\"labels\": P('data', None), \"x\": P('data', None, None)})",
        labels_over_another_axis,
        _HEADED,
        _HEAD,
        CLASSED,
        sk.PathRules({"x": ROWS, "labels": P("tensor")}),
        declared_by="the batch spec of batch/labels",
        mended={"spec": ROWS},
        finding="activation_gather",
    ),
    "rotation_by_length": odd_case(
        'batch=sk.PathRules({"cos": P(None, None), "sin": P(None, None), ',
        rotation_by_length,
        HEADS,
        BY_HEADS,
        {"x": SEQUENCES, **_ANGLES},
        sk.PathRules({"x": ROWS, "*": P("tensor")}),
        declared_by="the batch spec of batch/cos",
        mended={"spec": sk.PathRules({"x": ROWS, "*": P()})},
        finding="dim_gather",
    ),
    "output_within_heads": odd_case(
        f"P('data', None, 'tensor', None) {AT}",
        output_within_heads(P("data", None, None, "tensor")),
        HEADS,
        BY_HEADS,
        declared_by="the constraint at",
        mended={"loss": output_within_heads(P("data", None, "tensor", None))},
        finding="resharding",
    ),
    "depthwise_by_channels": odd_case(
        first_rule(dw="P(None, None, None, None)"),
        depthwise_by_channels,
        _DEPTHWISE,
        _CHANNELS,
        {"x": IMAGES},
        declared_by='PathRules["dw"] of params/dw',
        mended={"rules": {**_CHANNELS, "dw": P()}},
        finding="parameter_gather",
    ),
    "targets_by_height": odd_case(
        "batch=sk.PathRules({\"x\": P('data', None, None, None), \"y\": P('data', None,",
        targets_by_height,
        {"one": (3, 3, 16, 32), "two": (3, 3, 32, 16)},
        {"*": P()},
        {"x": IMAGES, "y": IMAGES},
        sk.PathRules({"x": ROWS, "y": P(None, "data")}),
        declared_by="the batch spec of batch/y",
        mended={"spec": ROWS},
        finding="activation_gather",
    ),
    "experts_whole": odd_case(
        f"P('tensor', 'data', None, None) {AT}",
        experts_whole(P(None, "data", None, None)),
        _EXPERTS,
        _BY_EXPERTS,
        declared_by="the constraint at",
        mended={"loss": experts_whole(P("tensor", "data", None, None))},
        finding="dim_gather",
    ),
    "statistics_split": odd_case(
        'model_state=sk.first_match(sk.PathRules({"mean": P(None)}), strategy.model_state)',
        _stateful(statistics_split),
        {},
        {"up": P(), "down": P()},
        declared_by='PathRules["mean"] of model_state/mean',
        init=lambda key: _learned(key, mean=jnp.zeros(4 * WIDTH)),
        model_state=sk.PathRules({"mean": P("tensor")}),
        mended={"model_state": sk.PathRules({"mean": P()})},
        finding="gradient_gather",
    ),
    "averaged_with_its_parameter": odd_case(
        first_rule(down="P('tensor', None)"),
        _stateful(averaged_with_its_parameter),
        {},
        _COLUMNS,
        declared_by='PathRules["down"] of params/down',
        init=_learned,
        model_state=sk.PathRules(_COLUMNS),
        mended={"rules": PAIR, "model_state": sk.PathRules(PAIR)},
        finding="split_contraction",
    ),
    "scale_and_offset": odd_case(
        first_rule(norm__offset="P(None)", norm__scale="P(None)"),
        scale_and_offset,
        {**SHAPES, "norm": {"scale": (WIDTH,), "offset": (WIDTH,)}},
        _NORMED,
        declared_by='PathRules["norm/*"] of params/norm/offset',
        mended={"rules": {**_NORMED, "norm/*": P()}},
        finding="dim_gather",
    ),
    "down_beside_constraints": odd_case(
        first_rule(down="P('tensor', None)"),
        down_beside_constraints,
        SHAPES,
        _COLUMNS,
        activations={"batch": "data", "mlp": "tensor"},
        declared_by='PathRules["down"] of params/down',
        mended={"rules": PAIR},
        finding="product_gather",
    ),
    "one_of_two_constraints": odd_case(
        f"P('data', None, None, None) {AT}",
        one_of_two_constraints(BY_KEYS),
        HEADS,
        _WHOLE,
        declared_by="the constraint at",
        mended={"loss": one_of_two_constraints(ROWS)},
        finding="split_contraction",
    ),
    "axes_in_another_order": odd_case(
        f"P(('data', 'tensor'), None, None) {AT}",
        axes_in_another_order(P(("tensor", "data"))),
        SHAPES,
        {"*": P()},
        spec=P(("data", "tensor")),
        declared_by="the constraint at",
        mended={"loss": axes_in_another_order(P(("data", "tensor")))},
        finding="activation_gather",
    ),
    "kernels_by_columns": odd_case(
        first_rule(
            layers__0__down__kernel="P('tensor', None)",
            layers__1__down__kernel="P('tensor', None)",
            layers__0__o__kernel="P('tensor', None)",
            layers__1__o__kernel="P('tensor', None)",
        ),
        kernels_by_columns,
        _STACKED,
        {"**/kernel": COLUMN},
        declared_by='PathRules["**/kernel"] of params/layers/0/down/kernel',
        mended={"rules": {**_ROWS_OF, "**/kernel": COLUMN}},
        finding="split_contraction",
    ),
}
