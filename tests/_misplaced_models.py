"""Misplaced declarations in models as their authors write them, each on the line of its name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced import ROWS, SEQUENCES, WIDTH, Case, X, square

LENGTH, VOCAB = 32, 1024
TOKENS = np.zeros((16, LENGTH), "i")


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(4 * WIDTH, use_bias=False, name="up")(x))
        x = x + nn.Dense(WIDTH, use_bias=False, name="down")(h)
        x = nn.with_logical_constraint(x, (None, "batch", None))  # linen_scan_constraint
        return x, None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="blocks")(x, None)[0]


def linen_scan_constraint(p, b, key):
    return jnp.mean(Scanned().apply({"params": p}, b["x"]) ** 2)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="wte")(tokens)
        table = nn.Embed(LENGTH, WIDTH, name="wpe")
        positions = table(jnp.arange(LENGTH))  # position_table_by_columns
        x = x + positions
        h = nn.gelu(nn.Dense(4 * WIDTH, use_bias=False, name="up")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(h)


def position_table_by_columns(p, b, key):
    return jnp.mean(Positions().apply({"params": p}, b["tokens"]) ** 2)


def labels_split_by_length(p, b, key):
    x = jnp.tanh(b["x"] @ p["w"])
    logits = x @ p["head"]
    picked = jnp.take_along_axis(logits, b["labels"][..., None], -1)  # labels_split_by_length
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked[..., 0])


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.embed.attend(x)  # nnx_tied_head


TIED = nnx.split(nnx.eval_shape(lambda: Tied(nnx.Rngs(0))), nnx.Param)


def nnx_tied_head(p, b, key):
    logits = nnx.merge(TIED[0], p)(b["tokens"])
    return jnp.mean(jax.nn.logsumexp(logits, -1))


def residual_constrained_twice(p, b, key):
    x = sk.nn.constrain(b["x"], "batch", None, None)
    for n in range(2):
        h = jnp.tanh(x @ p[f"up{n}"]) @ p[f"down{n}"]
        if n == 1:
            x = sk.nn.constrain(x + h, "batch", None, "embed")  # residual_constrained_twice
        else:
            x = sk.nn.constrain(x + h, "batch", None, None)
    return jnp.mean(jnp.tanh(x @ p["up2"]) ** 2)


def top_k_of_split_logits(p, b, key):
    logits = b["x"] @ p["head"]
    loss = jnp.mean(jax.nn.logsumexp(logits, -1))
    best = jax.lax.top_k(logits, 5)[1]  # top_k_of_split_logits
    hits = jnp.mean(jnp.any(best == 3, -1))
    return loss, {"top5": hits}


def argmax_of_split_logits(p, b, key):
    logits = b["x"] @ p["head"]
    loss = jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])
    whole = jax.lax.with_sharding_constraint(logits, P("data"))  # argmax_of_split_logits
    return loss, {"accuracy": jnp.mean(jnp.argmax(whole, -1) == b["labels"])}


def experts_split_inside(p, b, key):
    h = jnp.einsum("bd,edf->ebf", b["x"], p["up"])  # experts_split_inside
    y = jnp.einsum("ebf,efd->ebd", jax.nn.silu(h), p["down"])
    return jnp.mean(y**2)


def vmapped_heads(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->hbtk", b["x"], p[name]) for name in "qkv")

    def head(q, k, v):
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2))
        return jax.lax.with_sharding_constraint(weights @ v, P(None, "data", None))  # vmapped_heads

    out = jax.vmap(head)(q, k, v)
    return jnp.mean(jnp.einsum("hbtk,hkd->btd", out, p["o"]) ** 2)


def heads_first_constraint(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->hbtk", b["x"], p[name]) for name in "qkv")

    def head(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

    out = jax.vmap(head)(q, k, v)
    out = sk.nn.constrain(out, "batch", None, None, None)  # heads_first_constraint
    return jnp.mean(jnp.einsum("hbtk,hkd->btd", out, p["o"]) ** 2)


def equinox_output(p, b, key):
    import equinox as eqx

    names = ("query_proj", "key_proj", "value_proj", "output_proj")
    layer = eqx.nn.MultiheadAttention(8, WIDTH, key=jax.random.key(0))
    attention = eqx.tree_at(
        lambda layer: [getattr(layer, name).weight for name in names], layer, [p[n] for n in names]
    )
    mixed = jax.vmap(lambda x: attention(x, x, x))(b["x"])  # equinox_output
    return jnp.mean(mixed**2)


def moments_of_another_layout(p, b, key):
    return jnp.mean(jnp.tanh(b["x"] @ p["up"]) @ p["down"])


def gate_split_otherwise(p, b, key):
    up = b["x"] @ p["up"]
    gate = b["x"] @ p["gate"]  # gate_split_otherwise
    h = jax.nn.silu(gate) * up
    return jnp.mean((h @ p["down"]) ** 2)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(VOCAB, use_bias=False, name="lm_head")(nn.LayerNorm(name="norm")(x))
        x = nn.with_logical_constraint(x, ("batch", "length", None))  # logits_by_length
        return x


def logits_by_length(p, b, key):
    logits = Head().apply({"params": p}, b["x"])
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])


def hidden_whole_between_a_pair(p, b, key):
    h = jax.nn.gelu(b["x"] @ p["up"])
    h = sk.nn.constrain(h, "batch", None, None)  # hidden_whole_between_a_pair
    return jnp.mean((h @ p["down"]) ** 2)


def mask_split_by_keys(p, b, key):
    q, k, v = (jnp.einsum("btd,dhk->bthk", b["x"], p[name]) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = scores + b["mask"][:, None]  # mask_split_by_keys
    out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    return jnp.mean(jnp.einsum("bthk,hkd->btd", out, p["o"]) ** 2)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3, 3), use_bias=False, name="a")(x)
        x = jax.lax.with_sharding_constraint(x, P("data", None, None, "tensor"))  # channels_split
        x = nn.relu(nn.GroupNorm(2, name="norm")(x))
        return nn.Conv(32, (3, 3), use_bias=False, name="b")(x)


def channels_split(p, b, key):
    return jnp.mean(Normed().apply({"params": p}, b["x"]) ** 2)


IMAGES = np.ones((16, 16, 16, 32), "f")
BOTH = {"batch": "data", "embed": "tensor"}
HEADS = {"q": (WIDTH, 8, 16), "k": (WIDTH, 8, 16), "v": (WIDTH, 8, 16), "o": (8, 16, WIDTH)}
BY_HEADS = {"o": P("tensor"), "*": P(None, "tensor", None)}
PAIR = {"up*": P(None, "tensor"), "down*": P("tensor", None)}
UP, DOWN = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
MODELS = {
    "linen_scan_constraint": Case(
        linen_scan_constraint,
        {},
        {"**/up/kernel": P(None, None, "tensor"), "**/down/kernel": P(None, "tensor", None)},
        {"x": SEQUENCES},
        activations=ROWS,
        declared_by="the constraint at",
        init=lambda key: Scanned().init(key, SEQUENCES)["params"],
        finding="activation_gather",
    ),
    "position_table_by_columns": Case(
        position_table_by_columns,
        {},
        {
            "wpe/embedding": P(None, "tensor"),
            "up/kernel": P(None, "tensor"),
            "down/kernel": P("tensor", None),
            "**": sk.REPLICATED,
        },
        {"tokens": TOKENS},
        init=lambda key: Positions().init(key, TOKENS)["params"],
        finding="gradient_gather",
    ),
    "labels_split_by_length": Case(
        labels_split_by_length,
        {"w": (WIDTH, WIDTH), "head": (WIDTH, 256)},
        {"**": sk.REPLICATED},
        {"x": SEQUENCES, "labels": TOKENS},
        sk.PathRules({"x": P("data"), "labels": P(None, "data")}),
        finding="activation_gather",
    ),
    "nnx_tied_head": Case(
        nnx_tied_head,
        {},
        {
            "embed/**": P(None, "tensor"),
            "up/kernel/**": P(None, "tensor"),
            "down/kernel/**": P("tensor", None),
        },
        {"tokens": TOKENS},
        init=lambda key: nnx.split(Tied(nnx.Rngs(key)), nnx.Param)[1],
        finding="split_contraction",
    ),
    "residual_constrained_twice": Case(
        residual_constrained_twice,
        {"up0": UP, "down0": DOWN, "up1": UP, "down1": DOWN, "up2": UP},
        PAIR,
        {"x": SEQUENCES},
        activations=BOTH,
        finding="spec_mismatch",
    ),
    "top_k_of_split_logits": Case(
        top_k_of_split_logits,
        {"head": (WIDTH, VOCAB)},
        {"head": P(None, "tensor")},
        {"x": SEQUENCES},
        finding="activation_gather",
    ),
    "argmax_of_split_logits": Case(
        argmax_of_split_logits,
        {"head": (WIDTH, VOCAB)},
        {"head": P(None, "tensor")},
        {"x": SEQUENCES, "labels": TOKENS},
        declared_by="the constraint at",
        finding="parameter_gather",
    ),
    "experts_split_inside": Case(
        experts_split_inside,
        {"up": (8, WIDTH, 256), "down": (8, 256, WIDTH)},
        {"*": P(None, "tensor", None)},
        {"x": X},
        finding="resharding",
    ),
    "vmapped_heads": Case(
        vmapped_heads,
        HEADS,
        BY_HEADS,
        {"x": SEQUENCES},
        finding="activation_gather",
    ),
    "heads_first_constraint": Case(
        heads_first_constraint,
        HEADS,
        BY_HEADS,
        {"x": SEQUENCES},
        activations=ROWS,
        declared_by="the constraint at",
        finding="dim_gather",
    ),
    "equinox_output": Case(
        equinox_output,
        square("query_proj", "key_proj", "value_proj", "output_proj"),
        {"*": P("tensor", None)},
        {"x": SEQUENCES},
        finding="split_contraction",
    ),
    "logits_by_length": Case(
        logits_by_length,
        {},
        {"lm_head/kernel": P(None, "tensor"), "**": sk.REPLICATED},
        {"x": SEQUENCES},
        activations={"batch": "data", "length": "tensor"},
        init=lambda key: Head().init(key, SEQUENCES)["params"],
        finding="split_contraction",
    ),
    "hidden_whole_between_a_pair": Case(
        hidden_whole_between_a_pair,
        {"up": UP, "down": DOWN},
        PAIR,
        {"x": SEQUENCES},
        activations=ROWS,
        finding="dim_gather",
    ),
    "mask_split_by_keys": Case(
        mask_split_by_keys,
        HEADS,
        BY_HEADS,
        {"x": SEQUENCES, "mask": np.ones((16, LENGTH, LENGTH), "f")},
        sk.PathRules({"x": P("data"), "mask": P("data", None, "tensor")}),
        finding="dim_gather",
    ),
    "moments_of_another_layout": Case(
        moments_of_another_layout,
        {"up": UP, "down": DOWN},
        PAIR,
        opt_state=sk.PathRules(
            {
                "**/nu/up": P("tensor", None),
                "**/nu/down": P(None, "tensor"),
                "**/mu/up": P(None, "tensor"),
                "**/mu/down": P("tensor", None),
                "**": sk.REPLICATED,
            }
        ),
        finding="resharding",
    ),
    "channels_split": Case(
        channels_split,
        {},
        {"**": sk.REPLICATED},
        {"x": IMAGES},
        declared_by="the constraint at",
        init=lambda key: Normed().init(key, IMAGES)["params"],
        finding="split_contraction",
    ),
    "gate_split_otherwise": Case(
        gate_split_otherwise,
        {"up": UP, "gate": UP, "down": DOWN},
        {"gate": sk.REPLICATED, **PAIR},
        finding="gradient_gather",
    ),
}
# Here products send more than the fault: sums over tensor, as they should, or what follows from it.
BESIDE_PRODUCTS = """residual_constrained_twice vmapped_heads logits_by_length mask_split_by_keys
    hidden_whole_between_a_pair channels_split""".split()
