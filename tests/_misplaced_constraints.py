"""Misplaced constraints of inputs, labels, loops and derivative rules, on the line of a name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced import ROWS, SEQUENCES, WIDTH, Case, X, square

CLASSES, VOCAB, LENGTH = 1024, 1024, 32
pin = jax.lax.with_sharding_constraint
LABELS = np.zeros(64, "i")
TOKENS = np.zeros((16, LENGTH), "i")


def one_hot_over_another_axis(p, b, key):
    logits = jnp.tanh(b["x"] @ p["w"]) @ p["head"]
    hot = jax.nn.one_hot(b["labels"], CLASSES)
    hot = pin(hot, P("tensor", None))  # one_hot_over_another_axis
    return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))


def one_hot_whole(p, b, key):
    logits = jnp.tanh(b["x"] @ p["w"]) @ p["head"]
    hot = jax.nn.one_hot(b["labels"], CLASSES)
    hot = pin(hot, P(None, None))  # one_hot_whole
    return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
        h = nn.relu(nn.Dense(4 * WIDTH, name="up")(x))
        logits = nn.Dense(CLASSES, name="head")(h)
        hot = jax.nn.one_hot(labels, CLASSES)
        hot = nn.with_logical_constraint(hot, ("columns", None))  # linen_one_hot
        return jnp.mean(jnp.sum((jax.nn.softmax(logits) - hot) ** 2, -1))


def linen_one_hot(p, b, key):
    return Classifier().apply({"params": p}, b["x"], b["labels"])


class NnxClassifier(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4 * WIDTH, CLASSES, use_bias=False, rngs=rngs)

    def __call__(self, x, labels):
        logits = self.head(nnx.gelu(self.up(x)))
        hot = jax.nn.one_hot(labels, CLASSES)
        hot = pin(hot, P(("data", "tensor"), None))  # nnx_one_hot
        return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))


NNX = nnx.split(nnx.eval_shape(lambda: NnxClassifier(nnx.Rngs(0))), nnx.Param)


def nnx_one_hot(p, b, key):
    return nnx.merge(NNX[0], p)(b["x"], b["labels"])


def embedding_by_columns(p, b, key):
    h = jnp.take(p["table"], b["tokens"], axis=0)
    h = pin(h, P("data", None, "tensor"))  # embedding_by_columns
    h = h + jnp.tanh(h @ p["up"]) @ p["down"]
    return jnp.mean(h**2)


class LinenEmbedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        x = nn.with_logical_constraint(x, ("batch", None, "columns"))  # linen_embedding
        h = nn.Dense(4 * WIDTH, use_bias=False, name="up")(nn.LayerNorm(name="norm")(x))
        h = nn.Dense(WIDTH, use_bias=False, name="down")(nn.gelu(h))
        return nn.with_logical_constraint(x + h, ("batch", None, None))


def linen_embedding(p, b, key):
    return jnp.mean(LinenEmbedded().apply({"params": p}, b["tokens"]) ** 2)


class NnxEmbedded(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = sk.nn.constrain(x, None, None, "batch")  # nnx_embedding
        return x + self.down(nnx.gelu(self.up(x)))


EMBEDDED = nnx.split(nnx.eval_shape(lambda: NnxEmbedded(nnx.Rngs(0))), nnx.Param)


def nnx_embedding(p, b, key):
    return jnp.mean(nnx.merge(EMBEDDED[0], p)(b["tokens"]) ** 2)


def carry_of_a_recurrence(p, b, key):
    def cell(h, x):
        h = jnp.tanh(h @ p["h"] + x @ p["x"])
        h = pin(h, P(None, "data"))  # carry_of_a_recurrence
        return h, h

    start = jnp.zeros((b["x"].shape[0], WIDTH))
    _, out = jax.lax.scan(cell, start, b["x"].swapaxes(0, 1))
    return jnp.mean(out**2)


@jax.custom_vjp
def clipped(x, w):
    return jnp.tanh(x @ w)


def clipped_fwd(x, w):
    y = clipped(x, w)
    y = pin(y, P(None, "data"))  # constraint_in_a_derivative_rule
    return y, (x, w, y)


def clipped_bwd(kept, g):
    x, w, y = kept
    g = g * (1 - y**2)
    return g @ w.T, x.T @ g


clipped.defvjp(clipped_fwd, clipped_bwd)


def constraint_in_a_derivative_rule(p, b, key):
    h = jnp.tanh(b["x"] @ p["a"])
    return jnp.mean((clipped(h, p["b"]) @ p["c"]) ** 2)


def two_that_conflict(p, b, key):
    h = jnp.tanh(b["x"] @ p["up"])
    h = pin(h, P("data", None, "tensor"))
    h = jnp.tanh(h) * 2
    h = pin(h, P("data", "tensor", None))  # two_that_conflict
    return jnp.mean((h @ p["down"]) ** 2)


def dispatch_over_capacity(p, b, key):
    gates = jax.nn.softmax(b["x"] @ p["router"])
    index = gates.argmax(-1)
    place = jnp.cumsum(jax.nn.one_hot(index, 8), 0)
    place = jnp.take_along_axis(place, index[:, None], 1)[:, 0].astype("i")
    mask = jax.nn.one_hot(index, 8)[:, :, None] * jax.nn.one_hot(place, 16)[:, None]
    sent = jnp.einsum("txc,te->xce", mask, b["x"])
    sent = pin(sent, P(None, "tensor", None))  # dispatch_over_capacity
    h = jnp.tanh(jnp.einsum("xce,xef->xcf", sent, p["up"]))
    out = jnp.einsum("xcf,xfe->xce", h, p["down"])
    out = jnp.einsum("txc,xce->te", mask * gates[:, :, None], out)
    return jnp.mean(out**2)


def keys_by_length(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
    q = pin(q, P("data", None, "tensor", None))
    k = pin(k, P("data", "tensor", None, None))  # keys_by_length
    v = pin(v, P("data", None, "tensor", None))
    out = jax.nn.dot_product_attention(q, k, v)
    return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)


def momentum_over_rows(p, b, key):
    return jnp.mean(jnp.tanh(b["x"] @ p["up"]) @ p["down"])


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.two = nnx.Linear(4 * WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.three = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.one(x))  # middle_contraction
        x = nnx.gelu(self.two(x))
        return self.three(x)


LAYERS = nnx.split(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))), nnx.Param)


def middle_contraction(p, b, key):
    return jnp.mean(nnx.merge(LAYERS[0], p)(b["x"]) ** 2)


def pooled_rows(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    mean = h.mean(1)
    mean = pin(mean, P(None, "data"))  # pooled_rows
    return jnp.mean((mean @ p["head"]) ** 2)


def stacked_pair(p, b, key):
    both = jnp.stack([b["x"] @ p["a"], b["x"] @ p["b"]])
    both = pin(both, P("data", None, None))  # stacked_pair
    return jnp.mean(jnp.tanh(both[0] * both[1]) ** 2)


class Probs(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((8, 16), use_bias=False, name=n)(x) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        by_keys = ("batch", None, None, "columns")
        scores = nn.with_logical_constraint(scores, by_keys)  # linen_scores
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="o")(out)


def linen_scores(p, b, key):
    return jnp.mean(Probs().apply({"params": p}, b["x"]) ** 2)


class GluBlock(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.up = (nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs) for _ in "ab")
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        gate = nnx.silu(self.gate(x))
        gate = sk.nn.constrain(gate, "batch", None, None)  # nnx_gate
        return x + self.down(gate * self.up(x))


GLU = nnx.split(nnx.eval_shape(lambda: GluBlock(nnx.Rngs(0))), nnx.Param)


def nnx_gate(p, b, key):
    return jnp.mean(nnx.merge(GLU[0], p)(b["x"]) ** 2)


def mask_of_tokens(p, b, key):
    logits = jnp.tanh(b["x"] @ p["w"]) @ p["head"]
    losses = jax.nn.logsumexp(logits, -1) - logits[..., 0]
    mask = pin(b["mask"], P(None, "data"))  # mask_of_tokens
    return jnp.sum(losses * mask) / 16


def norm_by_columns(p, b, key):
    x = b["x"]
    for up, down in (("up0", "down0"), ("up1", "down1")):
        h = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        if up == "up1":
            h = pin(h, P("data", None, "tensor"))  # norm_by_columns
        x = x + jax.nn.gelu(h @ p[up]) @ p[down]
    return jnp.mean(x**2)


def inside_vmapped_heads(p, b, key):
    def head(w, x):
        q = x @ w
        q = pin(q, P("tensor", None, None))  # inside_vmapped_heads
        return jax.nn.softmax(q @ q.swapaxes(1, 2)) @ q

    out = jax.vmap(head, (1, None), 2)(p["q"], b["x"])
    return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)


def transposed_logits(p, b, key):
    logits = (b["x"] @ p["w"] @ p["head"]).swapaxes(1, 2)
    logits = pin(logits, P(None, "data", None))  # transposed_logits
    return jnp.mean(jax.nn.logsumexp(logits, 1))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            x = x + jnp.tanh(layer(x))
            x = pin(x, P(None, "data", None))  # nnx_scan
            return x

        return run(x, self.layers)


STACK = nnx.split(nnx.eval_shape(lambda: Stack(nnx.Rngs(0))), nnx.Param)


def nnx_scan(p, b, key):
    return jnp.mean(nnx.merge(STACK[0], p)(b["x"]) ** 2)


def shard_map_by_columns(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    by_columns = {"in_specs": P(None, "data"), "out_specs": P(None, "data")}
    h = jax.shard_map(lambda h: jnp.tanh(h) * 2, **by_columns)(h)  # shard_map_by_columns
    return jnp.mean((h @ p["head"]) ** 2)


def gates_by_length(p, b, key):
    gates, x = jax.nn.sigmoid(b["x"] @ p["a"]), b["x"] @ p["b"]

    def step(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    gates = pin(gates, P("data", "tensor", None))  # gates_by_length
    _, h = jax.lax.associative_scan(step, (gates, x), axis=1)
    return jnp.mean((h @ p["c"]) ** 2)


UP, DOWN = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
COLUMN, ROW = P(None, "tensor"), P("tensor", None)
PAIR = {"up*": COLUMN, "down*": ROW, "**": sk.REPLICATED}
DENSE = {"**/up/kernel": COLUMN, "**/down/kernel": ROW, "**": sk.REPLICATED}
HEAD = {"w": (WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
BY_CLASSES = {"head": COLUMN, "head/**": COLUMN, "**": sk.REPLICATED}
HEADS = {"q": (WIDTH, 8, 16), "k": (WIDTH, 8, 16), "v": (WIDTH, 8, 16), "o": (8, 16, WIDTH)}
BY_HEADS = {"o": P("tensor"), "o/**": P("tensor"), "**": P(None, "tensor", None)}
COLUMNS = {"batch": "data", "columns": "tensor"}


def case(loss, params=None, rules=None, batch=None, *, by="the constraint at", model=None, **more):
    if isinstance(model, type):
        more["init"] = lambda key: nnx.split(model(nnx.Rngs(key)), nnx.Param)[1]
    elif model is not None:
        more["init"] = lambda key: model.init(key, *(batch or {"x": X}).values())["params"]
    rules = rules or {"**": sk.REPLICATED}
    return Case(loss, params or {}, rules, batch or {"x": X}, declared_by=by, **more)


LABELLED, EMBEDDED_TOKENS, LONG = {"x": X, "labels": LABELS}, {"tokens": TOKENS}, {"x": SEQUENCES}
CONSTRAINTS = {
    "one_hot_over_another_axis": case(
        one_hot_over_another_axis, HEAD, BY_CLASSES, LABELLED, finding="parameter_gather"
    ),
    "one_hot_whole": case(one_hot_whole, HEAD, BY_CLASSES, LABELLED, finding="activation_gather"),
    "linen_one_hot": case(
        linen_one_hot,
        batch=LABELLED,
        model=Classifier(),
        activations=COLUMNS,
        finding="dim_gather",
    ),
    "nnx_one_hot": case(
        nnx_one_hot,
        rules=BY_CLASSES,
        batch=LABELLED,
        model=NnxClassifier,
        finding="split_contraction",
    ),
    "embedding_by_columns": case(
        embedding_by_columns,
        {"table": (VOCAB, WIDTH), "up": UP, "down": DOWN},
        PAIR,
        EMBEDDED_TOKENS,
        finding="gradient_gather",
    ),
    "linen_embedding": case(
        linen_embedding,
        rules=DENSE,
        batch=EMBEDDED_TOKENS,
        model=LinenEmbedded(),
        activations=COLUMNS,
        finding="gradient_gather",
    ),
    "nnx_embedding": case(
        nnx_embedding,
        batch=EMBEDDED_TOKENS,
        model=NnxEmbedded,
        activations=ROWS,
        finding="gradient_gather",
    ),
    "carry_of_a_recurrence": case(
        carry_of_a_recurrence, square("h", "x"), batch=LONG, finding="dim_gather"
    ),
    "constraint_in_a_derivative_rule": case(
        constraint_in_a_derivative_rule, square("a", "b", "c"), finding="activation_gather"
    ),
    "two_that_conflict": case(
        two_that_conflict, {"up": UP, "down": DOWN}, PAIR, LONG, finding="split_contraction"
    ),
    "dispatch_over_capacity": case(
        dispatch_over_capacity,
        {"router": (WIDTH, 8), "up": (8, *UP), "down": (8, *DOWN)},
        {"router": sk.REPLICATED, "*": P("tensor", None, None)},
        finding="resharding",
    ),
    "keys_by_length": case(keys_by_length, HEADS, BY_HEADS, LONG, finding="resharding"),
    "momentum_over_rows": case(
        momentum_over_rows,
        {"up": UP, "down": DOWN},
        PAIR,
        LONG,
        opt_state=sk.PathRules({"**/up": P("data", None), "**": sk.REPLICATED}),
        by="",
        finding="resharding",
    ),
    "middle_contraction": case(
        middle_contraction,
        rules={"one/**": COLUMN, "two/**": COLUMN, "three/**": ROW},
        batch=LONG,
        by="",
        model=Layers,
        finding="split_contraction",
    ),
    "pooled_rows": case(pooled_rows, HEAD, batch=LONG, finding="gradient_gather"),
    "stacked_pair": case(stacked_pair, square("a", "b"), finding="activation_gather"),
    "linen_scores": case(
        linen_scores,
        rules=BY_HEADS,
        batch=LONG,
        model=Probs(),
        activations=COLUMNS,
        finding="resharding",
    ),
    "nnx_gate": case(
        nnx_gate,
        rules={"down/**": ROW, "**": COLUMN},
        batch=LONG,
        model=GluBlock,
        activations=ROWS,
        finding="dim_gather",
    ),
    "mask_of_tokens": case(
        mask_of_tokens,
        HEAD,
        batch={"x": SEQUENCES, "mask": np.ones((16, LENGTH), "f")},
        finding="activation_gather",
    ),
    "norm_by_columns": case(
        norm_by_columns,
        {"up0": UP, "down0": DOWN, "up1": UP, "down1": DOWN},
        PAIR,
        LONG,
        finding="dim_gather",
    ),
    "inside_vmapped_heads": case(
        inside_vmapped_heads,
        {"q": (WIDTH, 8, 16), "o": (8, 16, WIDTH)},
        BY_HEADS,
        LONG,
        finding="activation_gather",
    ),
    "transposed_logits": case(transposed_logits, HEAD, batch=LONG, finding="activation_gather"),
    "shard_map_by_columns": case(shard_map_by_columns, HEAD, finding="gradient_gather"),
    "gates_by_length": case(
        gates_by_length, square("a", "b", "c"), batch=LONG, finding="resharding"
    ),
    "nnx_scan": case(nnx_scan, batch=LONG, model=Stack, finding="activation_gather"),
}
# Products send more than the fault: sums over tensor, or what their rules ask for without it.
BESIDE = """nnx_one_hot two_that_conflict keys_by_length norm_by_columns
    gates_by_length""".split()
