"""What a loss does with the rows of its batch: means and sums of rows, and what mixes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from shardkit._core.draws import trace_in_part
from shardkit._core.tracing import record_p
from shardkit.nn._constrain import constrain_p
from shardkit.nn._manual_axis_rules import use_param_p
from shardkit.step.rows import AlwaysZero, Constant, Mixed, PerRow, RowSum, follow_rows
from shardkit.step.rows._rules import RULES

ROWS = 16
X = jax.ShapeDtypeStruct((ROWS, 4), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((ROWS, 8, 4), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((ROWS, 6, 6, 4), jnp.float32)
LABELS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
TOKENS = jax.ShapeDtypeStruct((ROWS, 3), jnp.int32)
W = {"w": jnp.ones((4, 4)), "kernel": jnp.ones((3, 3, 4, 8))}


def followed(function, *batch, params=W):
    """States of the results of `function(params, *batch, key)`."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def traced(rows):
        sized = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in batch]
        return trace_in_part(function, (params, *sized, key))[0]

    leaves = [Constant()] * len(jax.tree.leaves(params))
    inputs = [*leaves, *[PerRow(0)] * len(batch), Constant()]
    return follow_rows(traced(ROWS), traced(2 * ROWS), inputs, ROWS)


def loss_and_gradients(loss):
    return lambda params, *rest: (loss(params, *rest), jax.grad(loss)(params, *rest)["w"])


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def scanned_layers(p, x):
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return jax.lax.scan(body, x, jnp.stack([p["w"]] * 3))[0]


def scanned_time(p, x):
    def cell(c, z):
        c = jnp.tanh(c @ p["w"] + z)
        return c, c

    return jax.lax.scan(cell, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[1]


def convolved(p, x, dims=("NHWC", "HWIO", "NHWC")):
    kernel = p["w"][None, None]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def two_views(p, x, y):
    both = jnp.concatenate([x, y]) @ p["w"]
    return jnp.mean((both[: x.shape[0]] - both[x.shape[0] :]) ** 2)


MEANS = {
    "mean square": (lambda p, x, y, k: jnp.mean((mlp(p, x) - y) ** 2), (X, X)),
    "labels": (lambda p, x, y, k: cross_entropy(mlp(p, x), y).mean(), (X, LABELS)),
    "own number": (
        lambda p, x, y, k: -jnp.mean(jax.nn.log_softmax(mlp(p, x))[jnp.arange(len(y)), y]),
        (X, LABELS),
    ),
    "along axis": (
        lambda p, x, y, k: jnp.mean(jnp.take_along_axis(mlp(p, x), y[:, None], 1)),
        (X, LABELS),
    ),
    "one-hot": (lambda p, x, y, k: jnp.mean(jax.nn.one_hot(y, 4) * mlp(p, x)), (X, LABELS)),
    "table": (lambda p, t, k: jnp.mean(p["w"][t] ** 2), (TOKENS,)),
    "decay": (lambda p, x, k: jnp.mean(mlp(p, x) ** 2) + 1e-3 * jnp.sum(p["w"] ** 2), (X,)),
    "folded": (
        lambda p, x, k: jnp.mean((x.reshape(-1, 4) @ p["w"]).reshape(x.shape) ** 2),
        (SEQUENCE,),
    ),
    "dropout": (lambda p, x, k: jnp.mean(mlp(p, x) * jax.random.bernoulli(k, 0.5, x.shape)), (X,)),
    "own keys": (
        lambda p, x, k: jax.vmap(lambda x, k: jnp.sum(x @ p["w"] * jax.random.normal(k, (4,))))(
            x, jax.random.split(k, len(x))
        ).mean(),
        (X,),
    ),
    "sort within": (lambda p, x, k: jnp.mean(jnp.sort(mlp(p, x), -1)[:, :2]), (X,)),
    "top k": (lambda p, x, k: jnp.mean(jax.lax.top_k(mlp(p, x), 2)[0]), (X,)),
    "convolution": (lambda p, x, k: jnp.mean(jnp.tanh(convolved(p, x)) ** 2), (IMAGES,)),
    "pooled": (lambda p, x, k: jnp.mean(nn.max_pool(x @ p["w"], (2, 2)) ** 2), (IMAGES,)),
    "layers": (lambda p, x, k: jnp.mean(scanned_layers(p, x) ** 2), (X,)),
    "time": (lambda p, x, k: jnp.mean(scanned_time(p, x) ** 2), (SEQUENCE,)),
    "loop": (
        lambda p, x, k: jnp.mean(jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ p["w"]), x)),
        (X,),
    ),
    "vmapped": (
        lambda p, x, y, k: jax.vmap(lambda x, y: jnp.sum((jnp.tanh(x @ p["w"]) - y) ** 2))(
            x, y
        ).mean(),
        (X, X),
    ),
    "attention": (
        lambda p, x, k: jnp.mean(
            jax.nn.dot_product_attention(*[(x @ p["w"])[:, :, None]] * 3, is_causal=True) ** 2
        ),
        (SEQUENCE,),
    ),
    "two views": (lambda p, x, y, k: two_views(p, x, y), (X, X)),
    "branch": (
        lambda p, x, k: jnp.mean(jax.lax.cond(p["w"][0, 0] > 0, jnp.tanh, jnp.sin, x @ p["w"])),
        (X,),
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_rows_is_known_as_one_and_so_are_its_gradients(name):
    loss, batch = MEANS[name]
    assert followed(loss_and_gradients(loss), *batch) == [RowSum(0), RowSum(0)]


@jax.custom_vjp
def clipped(y):
    return y


clipped.defvjp(lambda y: (y, None), lambda _, g: (g / jnp.maximum(1, jnp.linalg.norm(g)),))


def spread(p, x, k):
    y = mlp(p, x)
    return jnp.mean((y - y.mean(0)) ** 2) / (1e-3 + jnp.var(y))


def contrastive(p, x, k):
    z = mlp(p, x)
    return cross_entropy(z @ z.T, jnp.arange(len(z))).mean()


def mixed_up(p, x, k):
    y = mlp(p, x)
    return jnp.mean((y + y[jax.random.permutation(k, len(y))]) ** 2)


OTHERS = {
    "spread": (spread, (X,), "sub"),
    "contrastive": (contrastive, (X,), "dot_general"),
    "mixup": (mixed_up, (X,), "sort"),
    "segments": (
        lambda p, x, y, k: jnp.mean(jax.ops.segment_sum(mlp(p, x), y, 4) ** 2),
        (X, LABELS),
        "integer_pow",
    ),
    "sort over rows": (lambda p, x, k: jnp.mean(jnp.sort(mlp(p, x), 0)[:4]), (X,), "sort"),
    "largest": (lambda p, x, k: jnp.max(mlp(p, x) ** 2), (X,), "reduce_max"),
    "root of mean": (lambda p, x, k: jnp.sqrt(jnp.mean(mlp(p, x) ** 2)), (X,), "sqrt"),
    "softmax over rows": (
        lambda p, x, k: jnp.mean(jax.nn.softmax(mlp(p, x), 0)),
        (X,),
        "reduce_max",
    ),
    "place": (
        lambda p, x, k: jnp.mean(mlp(p, x) * jnp.arange(len(x))[:, None]),
        (X,),
        "mul",
    ),
    "neighbours": (lambda p, x, k: jnp.mean(mlp(p, x) * jnp.roll(x, 1, 0)), (X,), "slice"),
    "log of rows": (lambda p, x, k: jnp.mean(mlp(p, x)) + jnp.log(len(x)), (X,), "add"),
    "cumulative": (lambda p, x, k: jnp.mean(jnp.cumsum(mlp(p, x), 0) ** 2), (X,), "cumsum"),
    "first rows": (lambda p, x, k: jnp.mean(mlp(p, x)[:4] ** 2), (X,), "slice"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_mixes_rows_is_named_with_its_line(name):
    loss, batch, operation = OTHERS[name]
    state = followed(loss, *batch)[0]
    assert isinstance(state, Mixed)
    assert state.cause.operation == operation


def test_the_line_is_the_users():
    (state,) = followed(contrastive, X)
    assert state.cause.where.startswith("test_rows.py:")
    assert state.cause.where.endswith("in contrastive")


def test_a_custom_gradient_that_mixes_rows_is_seen_in_the_gradient():
    value, gradient = followed(
        loss_and_gradients(lambda p, x, k: jnp.mean(clipped(mlp(p, x)) ** 2)), X
    )
    assert value == RowSum(0)
    assert isinstance(gradient, Mixed)


def test_a_ratio_of_sums_is_known_as_one():
    def masked(p, x, m, k):
        return jnp.sum(jnp.sum(mlp(p, x) ** 2, -1) * m) / jnp.sum(m)

    (state,) = followed(masked, SEQUENCE, jax.ShapeDtypeStruct((ROWS, 8), jnp.float32))
    assert isinstance(state, Mixed)
    assert state.cause.ratio


@pytest.mark.parametrize(
    ("loss", "state"),
    [
        (lambda p, x, k: jnp.sum(mlp(p, x)), RowSum(1)),
        (lambda p, x, k: jnp.sum(mlp(p, x)) / ROWS, RowSum(1)),
        (lambda p, x, k: jnp.mean(mlp(p, x)) / len(x), RowSum(-1)),
        (lambda p, x, k: jnp.float32(len(x)), Constant(1)),
        (lambda p, x, k: jnp.zeros(()), AlwaysZero()),
        (lambda p, x, k: p["w"].sum(), Constant(0)),
    ],
)
def test_how_a_value_grows_with_the_rows(loss, state):
    assert followed(loss, X) == [state]


@pytest.mark.parametrize("primitive", [constrain_p, use_param_p, record_p], ids=str)
def test_the_marks_of_a_model_leave_rows_as_they_are(primitive):
    assert RULES[primitive.name] is RULES["copy"]
