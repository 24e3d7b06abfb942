"""What a loss does with the rows of its batch: means and sums of rows, and what mixes them."""

import gc
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl
from jax.extend import core

import shardkit as sk
from shardkit._core.draws import trace_in_part
from shardkit.errors import StepError
from shardkit.nn._constrain import constrain_p
from shardkit.nn._manual_axis_rules import use_param_p
from shardkit.parity._random_batches import _FIRST, _LOOKUPS
from shardkit.planner._program import _IDENTITIES
from shardkit.planner._propagation import _RULES, KEEPS_PARTIAL, MATERIALIZED, STAYS_PARTIAL
from shardkit.report.time._flops import _COUNTED
from shardkit.step.rows import AlwaysZero, Constant, Mixed, PerRow, RowSum, follow_rows
from shardkit.step.rows._equation import RowCounts
from shardkit.step.rows._rules import RULES, SCALE_DEGREE

ROWS = 16
TWICE = RowCounts(ROWS, 2 * ROWS)
REDUCE = sk.Precision(reduce_dtype="bfloat16")
X = jax.ShapeDtypeStruct((ROWS, 4), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((ROWS, 8, 4), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((ROWS, 6, 6, 4), jnp.float32)
LABELS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
TOKENS = jax.ShapeDtypeStruct((ROWS, 3), jnp.int32)
W = {"w": jnp.ones((4, 4)), "kernel": jnp.ones((3, 3, 4, 8))}


def compiled(loss, *, batch=X, devices=4, **options):
    """The step of a loss of `W`, its rows over some devices."""
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: W,
        batch=batch,
        mesh=sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices]),
        strategy=sk.strategies.data(),
        **options,
    )


def traced(function, batch, rows, params=W):
    """The program of `function(params, *batch, key)` on a number of rows."""
    sized = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in batch]
    key = jax.eval_shape(lambda: jax.random.key(0))
    return trace_in_part(function, (params, *sized, key))[0]


def followed(function, *batch, params=W, rows=TWICE):
    """States of the results of `function(params, *batch, key)`."""
    few, many = (traced(function, batch, n, params) for n in rows)
    leaves = [Constant()] * len(jax.tree.leaves(params))
    inputs = [*leaves, *[PerRow(0)] * len(batch), Constant()]
    return follow_rows(few, many, inputs, rows)


def loss_and_gradients(loss):
    return lambda params, *rest: (loss(params, *rest), jax.grad(loss)(params, *rest)["w"])


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


def shown(value):
    jax.debug.callback(lambda x: None, value)
    jax.debug.print("{}", value, ordered=False)
    return value


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


def columns(how):
    """Combines two columns of each row with two others, at fixed places."""
    return lambda p, x, k: jnp.mean(getattr((x @ p["w"]).at[:, jnp.array([0, 2])], how)(x[:, :2]))


def subtracted(operand, places, updates):
    numbers = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
    return jax.lax.scatter_sub(operand, places[:, None], updates, numbers)


def marked(put):
    """Weighs rows by a mask that `put` makes from zeros for each."""
    return lambda p, x, k: jnp.mean(put(jnp.zeros((len(x), 1))) * mlp(p, x))


def in_turn(p, x):
    """The model on one row after another, in a loop."""
    return jax.lax.map(lambda row: mlp(p, row), x)


def summed_in_turn(p, x):
    return jax.lax.scan(lambda total, row: (total + mlp(p, row).mean(), None), 0.0, x)[0]


def chunks_in_turn(p, x):
    """Two tokens at a time, whose products are computed again for the gradient."""

    @jax.checkpoint
    def turn(total, chunk):
        return total + jnp.sum(mlp(p, chunk) ** 2), mlp(p, chunk).mean()

    total, means = jax.lax.scan(turn, 0.0, x.reshape(-1, 2, x.shape[-1]))
    return total / x.size + means.mean()


def systems(p, x):
    """A positive definite matrix for each row, and the right side that goes with it."""
    h = x[:, :4] @ p["w"]
    return h @ h.swapaxes(1, 2) + jnp.eye(4), h[..., 0]


def iterated(p, row):
    """A loop that ends when `row` says so."""

    def turn(state):
        y, turns = state
        return 0.5 * jnp.tanh(y @ p["w"]) + row, turns + 1

    def goes_on(state):
        return (jnp.abs(state[0]).sum() > 1e-3) & (state[1] < 5)

    y, turns = jax.lax.while_loop(goes_on, turn, (row, 0))
    return jax.lax.stop_gradient(y) * turns


def running_means(p, x):
    def turn(mean, row):
        mean = 0.9 * mean + 0.1 * row
        return mean, mlp(p, row - mean)

    return jax.lax.scan(turn, jnp.zeros(4), x)[1]


def sums_so_far(p, x):
    def turn(total, row):
        total = total + mlp(p, row)
        return total, total

    return jax.lax.scan(turn, jnp.zeros(4), x)[1]


def numbered(p, x):
    return jax.lax.scan(lambda i, row: (i + 1, i * mlp(p, row)), 0, x)[1]


def branched(p, x):
    def turn(carry, row):
        return jax.lax.cond(row[0] > 0, lambda c: (c, c + row), lambda c: (2 * c, row), carry)

    return jax.lax.scan(turn, jnp.zeros(4), mlp(p, x))[1]


def called_back(p, x):
    def turn(row):
        shape = jax.ShapeDtypeStruct(row.shape, row.dtype)
        return row + jax.pure_callback(np.asarray, shape, jax.lax.stop_gradient(row))

    return jax.lax.map(turn, mlp(p, x))


def looped(start, turn):
    """A loop over the rows by their numbers; `turn(params, rows, number, carry) → carry`."""

    def run(p, x):
        return jax.lax.fori_loop(0, len(x), lambda i, c: turn(p, x, i, c), start(x))

    return run


def added(p, x, i, total):
    return total + mlp(p, x[i]).mean()


def written(p, x, i, out):
    return out.at[i].set(mlp(p, x[i]))


def updated(p, x, i, out):
    return jax.lax.dynamic_update_index_in_dim(out, mlp(p, x[i]), i, 0)


def squares_in_place(p, x):
    """Writes one number a row, and takes another carry along."""

    def turn(carry, i):
        out, total = carry
        return (out.at[i].set(jnp.sum(mlp(p, x[i]) ** 2)), total + x[i].sum()), x[i] @ p["w"]

    (out, total), ys = jax.lax.scan(turn, (jnp.zeros(len(x)), 0.0), jnp.arange(len(x)))
    return out.mean() + total / len(x) + ys.mean()


NUMBERED = {
    "added": lambda p, x: looped(lambda x: 0.0, added)(p, x) / len(x),
    "added, of a layer": lambda p, x: looped(lambda x: 0.0, added)(p, x @ p["w"]) / len(x),
    "written": lambda p, x: jnp.mean(looped(jnp.zeros_like, written)(p, x) ** 2),
    "updated": lambda p, x: jnp.mean(looped(jnp.zeros_like, updated)(p, x) ** 2),
    "added in place": lambda p, x: jnp.mean(
        looped(lambda x: x, lambda p, x, i, y: y.at[i].add(mlp(p, x[i])))(p, x) ** 2
    ),
    "squares": squares_in_place,
}


KEY = jax.random.key(3)
MEANS = {
    "printed": (lambda p, x, k: shown(jnp.mean(shown(mlp(p, x)) ** 2)), [X]),
    **{
        f"{name}, by number": (lambda p, x, k, loss=loss: loss(p, x), (X,))
        for name, loss in NUMBERED.items()
    },
    "in turn": (lambda p, x, k: jnp.mean(in_turn(p, x) ** 2), (X,)),
    "folded, in turn": (lambda p, x, k: jnp.mean(in_turn(p, x.reshape(-1, 4)) ** 2), (SEQUENCE,)),
    "chunks of tokens, in turn": (lambda p, x, k: chunks_in_turn(p, x[:, :2]), (SEQUENCE,)),
    "sum in turn": (lambda p, x, k: summed_in_turn(p, x) / len(x), (X,)),
    "length, in turn": (
        lambda p, x, k: jnp.mean(jax.lax.map(lambda row: scanned_time(p, row[None]), x) ** 2),
        (SEQUENCE,),
    ),
    "columns mul": (columns("mul"), (X,)),
    "columns set": (columns("set"), (X,)),
    "columns max": (columns("max"), (X,)),
    "own zero": (
        lambda p, x, y, k: jnp.mean(
            jnp.ones((len(y), 4)).at[jnp.arange(len(y)), y].set(0.0) * mlp(p, x)
        ),
        (X, LABELS),
    ),
    "segments subtracted": (
        lambda p, x, y, k: jnp.sum(subtracted(jnp.zeros((4, 4)), y, mlp(p, x))) / len(x),
        (X, LABELS),
    ),
    "mean square": (lambda p, x, y, k: jnp.mean((mlp(p, x) - y) ** 2), (X, X)),
    "labels": (lambda p, x, y, k: cross_entropy(mlp(p, x), y).mean(), (X, LABELS)),
    "own number": (
        lambda p, x, y, k: -jnp.mean(jax.nn.log_softmax(mlp(p, x))[jnp.arange(len(y)), y]),
        (X, LABELS),
    ),
    "rows again by number": (
        lambda p, x, k: jnp.mean(
            (mlp(p, x)[jnp.repeat(jnp.arange(len(x)), 3)] - jnp.repeat(x, 3, 0)) ** 2
        ),
        (X,),
    ),
    "rows again by numpy": (
        lambda p, x, k: jnp.mean(
            (mlp(p, x)[np.repeat(np.arange(len(x)), 3)] - jnp.repeat(x, 3, 0)) ** 2
        ),
        (X,),
    ),
    "words of each row": (
        lambda p, x, k: jnp.mean(
            jax.ops.segment_sum(
                mlp(p, x).reshape(-1, 4), np.repeat(np.arange(len(x)), x.shape[1]), len(x)
            )
            ** 2
        ),
        (SEQUENCE,),
    ),
    "own number, by numpy": (
        lambda p, x, y, k: -jnp.mean(jax.nn.log_softmax(mlp(p, x))[np.arange(len(y)), y]),
        (X, LABELS),
    ),
    "own numbers, by numpy": (
        lambda p, x, k: jnp.mean(mlp(p, x)[np.arange(len(x))[:, None], jnp.argsort(x)[:, :2]]),
        (X,),
    ),
    "ones by numpy": (lambda p, x, k: jnp.mean(mlp(p, x) * np.ones((len(x), 1), "f")), (X,)),
    "state by numpy": (
        lambda p, x, k: jnp.mean(
            jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + x), np.zeros(x.shape, "f"))
        ),
        (X,),
    ),
    "array of 1 / n by numpy": (
        lambda p, x, k: jnp.sum(mlp(p, x).mean(1) * np.full(len(x), 1 / len(x), "f")),
        (X,),
    ),
    "power of 1": (lambda p, x, k: jnp.mean(mlp(p, x)) ** 1, (X,)),
    "time by time": (
        lambda p, x, k: jnp.mean(jax.lax.map(lambda i: mlp(p, x[:, i]), jnp.arange(3)) ** 2),
        (SEQUENCE,),
    ),
    "class token": (
        lambda p, x, k: jnp.mean((jnp.tile(p["w"][:1], (len(x), 1)) * mlp(p, x)) ** 2),
        (X,),
    ),
    "closed-over key": (
        lambda p, x, k: jnp.mean((mlp(p, x) * jax.random.normal(KEY, (4,))) ** 2),
        (X,),
    ),
    "along axis": (
        lambda p, x, y, k: jnp.mean(jnp.take_along_axis(mlp(p, x), y[:, None], 1)),
        (X, LABELS),
    ),
    "one-hot": (lambda p, x, y, k: jnp.mean(jax.nn.one_hot(y, 4) * mlp(p, x)), (X, LABELS)),
    "table": (lambda p, t, k: jnp.mean(p["w"][t] ** 2), (TOKENS,)),
    "positions": (
        lambda p, x, k: jnp.mean(
            p["w"][jnp.broadcast_to(jnp.arange(4), x.shape)] * x[..., None] + mlp(p, x)[:, None]
        ),
        (X,),
    ),
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
    "systems": (
        lambda p, x, k: jnp.mean(jax.vmap(jnp.linalg.solve)(*systems(p, x))),
        (SEQUENCE,),
    ),
    "solved by a weight": (
        lambda p, x, k: jnp.mean(jax.vmap(lambda row: jnp.linalg.solve(p["w"] @ p["w"], row))(x)),
        (X,),
    ),
    "loop of each row": (
        lambda p, x, k: jnp.mean(jax.vmap(lambda row: mlp(p, row) * iterated(p, row))(x)),
        (X,),
    ),
    "put": (lambda p, x, k: jnp.mean(mlp(p, jax.device_put(x))), (X,)),
    "tiled": (lambda p, x, k: jnp.mean(jnp.tile(mlp(p, x), (2, 3)) ** 2), (X,)),
    "array of 1 / n": (
        lambda p, x, k: jnp.sum(mlp(p, x) * np.full((1, 4), 1 / len(x), "f")),
        (X,),
    ),
    "branch": (
        lambda p, x, k: jnp.mean(jax.lax.cond(p["w"][0, 0] > 0, jnp.tanh, jnp.sin, x @ p["w"])),
        (X,),
    ),
}


@pytest.mark.parametrize("rows", [(16, 32), (4, 16), (2, 6)])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_rows_is_known_as_one_and_so_are_its_gradients(name, rows):
    loss, batch = MEANS[name]
    states = followed(loss_and_gradients(loss), *batch, rows=RowCounts(*rows))
    assert states == [RowSum(0), RowSum(0)]


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


def mirrored(times):
    return jnp.concatenate([times, 1 - times])


def at(index):
    """The mean of a model on the rows at `index(own numbers, rows)`."""
    return lambda p, x, k: jnp.mean(x[index(jnp.arange(len(x)), x)] @ p["w"])


def doubled(x):
    """A kernel, as attention that is written by hand."""

    def kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def of_slots(turn):
    """The mean of rows that a loop by number leaves behind."""
    return lambda p, x, k: jnp.mean(looped(lambda x: x, turn)(p, x) ** 2)


def pooled(p, x, combine=jax.lax.add, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=None):
    """Windows of one row."""
    sizes = (1, 2), strides, padding
    start = 0.0 if combine is jax.lax.add else -jnp.inf
    return jax.lax.reduce_window(mlp(p, x), start, combine, *sizes, base_dilation=dilation)


def each_twice(x):
    return jnp.repeat(x, 2, 0)


def all_twice(x):
    return jnp.concatenate([x, x])


OTHERS = {
    "windows of every other row": (
        lambda p, x, k: jnp.mean(pooled(p, x, strides=(2, 1)) ** 2),
        (X,),
        "reduce_window_sum",
    ),
    "maxima of every other row": (
        lambda p, x, k: jnp.mean(pooled(p, x, jax.lax.max, (2, 1))),
        (X,),
        "reduce_window_max",
    ),
    "windows beside the rows": (
        lambda p, x, k: jnp.mean(pooled(p, x, padding=((0, 3), (0, 0)))),
        (X,),
        "reduce_window_sum",
    ),
    "windows between the rows": (
        lambda p, x, k: jnp.mean(jnp.exp(pooled(p, x, dilation=(2, 1)))),
        (X,),
        "reduce_window_sum",
    ),
    "numbers of rows for numbers of words": (
        lambda p, x, k: jnp.mean(
            mlp(p, x).reshape(-1, 4)[jnp.repeat(jnp.arange(len(x)), x.shape[1])] ** 2
        ),
        (SEQUENCE,),
        "gather",
    ),
    "words put at numbers of rows": (
        lambda p, x, k: jnp.mean(
            x.reshape(-1, 4)
            * jnp.zeros((x.shape[0] * x.shape[1], 4))
            .at[jnp.repeat(jnp.arange(len(x)), x.shape[1])]
            .add(mlp(p, x).reshape(-1, 4))
        ),
        (SEQUENCE,),
        "mul",
    ),
    "rows at the numbers of others": (
        lambda p, x, k: jnp.mean(
            x * jnp.zeros_like(x).at[each_twice(jnp.arange(len(x)))].add(all_twice(mlp(p, x)))
        ),
        (X,),
        "scatter-add",
    ),
    "rows in the segments of others": (
        lambda p, x, y, k: (
            jnp.sum(jax.ops.segment_sum(all_twice(mlp(p, x)), each_twice(y), 4) * p["w"]) / len(x)
        ),
        (X, LABELS),
        "scatter-add",
    ),
    "numbers put as values": (
        lambda p, x, y, k: jnp.mean(
            mlp(p, x)
            * jnp.zeros((len(y), 4), int).at[jnp.arange(len(y)), y].set(jnp.arange(len(y)))
        ),
        (X, LABELS),
        "scatter",
    ),
    "numbers summed in segments": (
        lambda p, x, y, k: jnp.sum(jax.ops.segment_sum(jnp.arange(len(y)), y, 4) * p["w"]) / len(y),
        (X, LABELS),
        "scatter-add",
    ),
    "gamma of the number of rows": (
        lambda p, x, k: jnp.mean(mlp(p, x) * jax.random.gamma(k, 1.0 * len(x), (len(x), 1))),
        (X,),
        "random_gamma",
    ),
    "gamma of two views": (
        lambda p, x, k: jnp.mean(jax.random.gamma(k, jnp.exp(all_twice(mlp(p, x))))),
        (X,),
        "random_gamma",
    ),
    "columns of others": (
        lambda p, x, y, k: jnp.mean(
            jnp.take_along_axis(all_twice(mlp(p, x)), each_twice(y)[:, None], 1)
        ),
        (X, LABELS),
        "gather",
    ),
    "own row or the next": (at(lambda i, x: jnp.where(x[:, 0] > 0, i, i + 1)), (X,), "select_n"),
    "next row, always": (at(lambda i, x: jnp.where(i >= 0, i + 1, i)), (X,), "ge"),
    "row of twice the number": (at(lambda i, x: i + i), (X,), "add"),
    "row of no number": (at(lambda i, x: i - i), (X,), "sub"),
    "row from the end": (at(lambda i, x: -i), (X,), "neg"),
    "row of a running number": (
        at(lambda i, x: jnp.cumsum(jnp.broadcast_to(i[:, None], (len(i), 2)), 1)[:, 1]),
        (X,),
        "cumsum",
    ),
    "whole part": (lambda p, x, k: jax.lax.div(jnp.sum(jnp.int32(x > 0)), 3), (X,), "div"),
    "kernel": (lambda p, x, k: jnp.mean(doubled(mlp(p, x))), (X,), "pallas_call"),
    "edges of ones": (
        marked(lambda zeros: jnp.convolve(zeros[:, 0] + 1, jnp.ones(3), "same")[:, None]),
        (X,),
        "conv_general_dilated",
    ),
    "table in as many rows": (
        lambda p, x, k: jnp.mean(mlp(p, x)) * jnp.max(p["w"].reshape(len(x) // 16, -1)),
        (X,),
        "reshape",
    ),
    "row before, by number": (of_slots(lambda p, x, i, y: y.at[i].set(y[i - 1])), (X,), "scan"),
    "first row, by number": (of_slots(lambda p, x, i, y: y.at[i].set(y[0])), (X,), "scan"),
    "one place": (of_slots(lambda p, x, i, y: y.at[0].set(y[0] + x[i])), (X,), "scan"),
    "place by label": (
        of_slots(lambda p, x, i, y: y.at[jnp.argmax(x[i])].set(x[i])),
        (X,),
        "scan",
    ),
    "row after, by number": (
        lambda p, x, k: looped(lambda x: 0.0, lambda p, x, i, c: c + x[i + 1].sum())(p, x),
        (X,),
        "lt",
    ),
    "weight by number": (
        lambda p, x, k: looped(lambda x: 0.0, lambda p, x, i, c: c + i * x[i].sum())(p, x),
        (X,),
        "mul",
    ),
    "a draw for two rows": (
        lambda p, x, k: jnp.mean(mirrored(jax.random.uniform(k, (len(x) // 2, 1))) * mlp(p, x)),
        (X,),
        "random_bits",
    ),
    "another operand": (
        lambda p, x, k: jnp.mean(jnp.tanh(*[[x @ p["w"], x * p["w"][0]][len(x) > ROWS]]) + 0 * x),
        (X,),
        "tanh",
    ),
    "loop of all rows": (lambda p, x, k: jnp.mean(iterated(p, x)), (X,), "while"),
    "rows as unknowns": (
        lambda p, x, k: jnp.mean(
            jax.lax.linalg.triangular_solve(jnp.ones((len(x), len(x))), mlp(p, x), left_side=True)
        ),
        (X,),
        "triangular_solve",
    ),
    "solved by a sum": (
        lambda p, x, k: jnp.mean(jax.lax.linalg.triangular_solve(x.T @ x, mlp(p, x))),
        (X,),
        "triangular_solve",
    ),
    "running means": (lambda p, x, k: jnp.mean(running_means(p, x) ** 2), (X,), "scan"),
    "sums so far": (lambda p, x, k: jnp.mean(sums_so_far(p, x)), (X,), "scan"),
    "carry in a branch": (lambda p, x, k: jnp.mean(branched(p, x)), (X,), "scan"),
    "no rule for many rows": (lambda p, x, k: jnp.mean(called_back(p, x)), (X,), "scan"),
    "numbered in turn": (lambda p, x, k: jnp.mean(numbered(p, x)), (X,), "mul"),
    "centred, in turn": (lambda p, x, k: jnp.mean(in_turn(p, x - x.mean(0))), (X,), "sub"),
    "first row set": (lambda p, x, k: jnp.mean(mlp(p, x).at[0].set(0.0) ** 2), (X,), "scatter"),
    "first rows set": (
        lambda p, x, k: jnp.mean(mlp(p, x).at[jnp.array([0, 2])].add(p["w"][0])),
        (X,),
        "scatter-add",
    ),
    "first row marked": (marked(lambda zeros: zeros.at[0].set(1.0)), (X,), "scatter"),
    "row marked by slice": (
        marked(lambda zeros: jax.lax.dynamic_update_slice(zeros, jnp.ones((1, 1)), (0, 0))),
        (X,),
        "dynamic_update_slice",
    ),
    "row marked by padding": (
        marked(lambda zeros: jnp.pad(zeros[1:], ((1, 0), (0, 0)), constant_values=1.0)),
        (X,),
        "pad",
    ),
    "first rows masked": (
        lambda p, x, k: jnp.mean(jnp.where(jnp.arange(len(x))[:, None] < 3, 0.0, mlp(p, x))),
        (X,),
        "lt",
    ),
    "first rows, by numpy": (
        lambda p, x, k: jnp.mean(mlp(p, x)[:, 0] * (np.arange(len(x)) < 3)),
        (X,),
        "a constant",
    ),
    "order by numpy": (
        lambda p, x, k: jnp.mean(mlp(p, x)[np.arange(len(x))[::-1]] * x),
        (X,),
        "a constant",
    ),
    "number by numpy": (
        lambda p, x, k: jnp.mean(mlp(p, x) * np.arange(len(x))[:, None]),
        (X,),
        "mul",
    ),
    "halves of constants": (
        lambda p, x, k: jnp.mean(
            jnp.concatenate([jnp.ones(len(x) // 2), jnp.zeros(len(x) // 2)])[:, None] * mlp(p, x)
        ),
        (X,),
        "concatenate",
    ),
    "rows marked in turn": (
        lambda p, x, k: jnp.mean(
            jnp.stack([jnp.ones(len(x) // 2), jnp.zeros(len(x) // 2)], 1).reshape(-1, 1) * mlp(p, x)
        ),
        (X,),
        "reshape",
    ),
    "power of the rows": (
        lambda p, x, k: jnp.mean(mlp(p, x)) * jnp.prod(jnp.full((len(x),), 1.1)),
        (X,),
        "reduce_prod",
    ),
    "place by a sum": (marked(lambda zeros: jnp.cumsum(zeros + 1, 0)), (X,), "cumsum"),
    "edges by a window": (
        marked(lambda zeros: nn.avg_pool((zeros + 1)[None], (3,), padding="SAME")[0]),
        (X,),
        "reduce_window_sum",
    ),
    "table zeroed by rows": (
        lambda p, y, k: jnp.sum(jnp.ones(4).at[y].set(0.0) * p["w"][0]),
        (LABELS,),
        "scatter",
    ),
    "segment maxima": (
        lambda p, x, y, k: jnp.mean(jax.ops.segment_max(mlp(p, x), y, 4)),
        (X, LABELS),
        "scatter-max",
    ),
    "maximum of a sum": (
        lambda p, x, k: jnp.sum(jnp.zeros(4).at[jnp.arange(4)].max(mlp(p, x).mean(0))),
        (X,),
        "scatter-max",
    ),
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
    "offsets of graphs": (
        lambda p, x, y, k: jnp.mean(mlp(p, x.reshape(-1, 4))[(jnp.arange(len(x)) * 4 + y)]),
        (X, LABELS),
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
    assert state.cause.where.startswith("test_rows.py:")
    assert ("jax.vmap(f)(rows)" in state.cause.fix) >= (name in ("place", "offsets of graphs"))


def test_rows_are_right_sides_of_one_matrix():
    def solved(p, x, k):
        return jax.scipy.linalg.solve_triangular(p["w"], x.T, lower=True).T

    assert followed(solved, X) == [PerRow(0)]


def test_the_line_is_the_users():
    (state,) = followed(contrastive, X)
    assert state.cause.where.startswith("test_rows.py:")
    assert state.cause.where.endswith("in contrastive")


EPS = 1e-6


def heavy(x):
    return x[:, 0] ** 2


@pytest.mark.parametrize(
    "ratio",
    [
        "jnp.sum(errors(p, x) * heavy(x)) / jnp.sum(heavy(x))",
        "3 - 2 * jnp.sum(errors(p, x) * heavy(x)) / jnp.sum(heavy(x))",
        "-(errors(p, x) @ heavy(x) / (1e-9 + heavy(x).sum())) + 1",
        "jnp.sum(errors(p, x) * heavy(x)) / jnp.maximum(jnp.sum(heavy(x)), 1)",
        "(errors(p, x) * heavy(x)).sum() / heavy(x).sum().clip(1)",
        "jnp.sum(errors(p, x) * heavy(x)) / jnp.clip(jnp.sum(heavy(x)), min=1)",
        "jnp.sum(errors(p, x) * heavy(x)) / jnp.maximum(EPS, jnp.sum(heavy(x)))",
        "jnp.divide(errors(p, x) @ heavy(x), jnp.where(heavy(x).sum() > 0, heavy(x).sum(), 1))",
    ],
)
def test_the_fix_of_a_ratio_is_the_same_loss(ratio, tmp_path):
    source = tmp_path / "model.py"
    source.write_text(f"def loss(p, x, k):\n    return {ratio}\n")
    os.utime(source, (1e9, 1e9))  # older than this process: its lines are those that run
    exec(compile(source.read_text(), source, "exec"), module := {**globals()})
    loss = module["loss"]
    with pytest.raises(StepError, match="if its weight depends on the parameters") as refused:
        compiled(loss, accumulate=2)
    (fix,) = re.findall(r"sk\.Mean\(.*\)(?=(?:, which is .*)?; or, if)", str(refused.value))
    as_mean = eval(f"lambda p, x, k: {fix}", globals())
    x = np.random.default_rng(0).normal(size=X.shape).astype("f")
    want, of_w = jax.value_and_grad(loss)(W, x, None)
    value, got = jax.value_and_grad(lambda p: of_mean(as_mean(p, x, None)))(W)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(got["w"], of_w["w"], rtol=1e-5)
    if "where" in ratio:
        compiled(as_mean, accumulate=2)


def guarded_before(p, x, k):
    size = jnp.maximum(jnp.sum(heavy(x)), 7)
    return jnp.sum(errors(p, x) * heavy(x)) / size


# Guards that are no guards alone: with other numbers than a mean without them.
GUARDED = {
    "at least": (
        lambda p, x, k: jnp.sum(errors(p, x) * heavy(x)) / jnp.maximum(jnp.sum(heavy(x)), 1000),
        r"sk.Mean\(jnp.sum\(errors\(p, x\) \* heavy\(x\)\), jnp.sum\(heavy\(x\)\)\), which is "
        "the same where its weight is 0, or 1000 or more",
    ),
    "added": (
        lambda p, x, k: jnp.sum(errors(p, x) * heavy(x)) / (jnp.sum(heavy(x)) + 1.0),
        "which is the same where 1.0 is tiny beside its weight",
    ),
    "before": (guarded_before, "size being the sum without its guard"),
}


@pytest.mark.parametrize("name", GUARDED)
def test_the_fix_of_a_guarded_ratio_says_what_it_changes(name):
    loss, change = GUARDED[name]
    with pytest.raises(StepError, match=change):
        compiled(loss, accumulate=2)


def test_a_custom_gradient_that_is_not_linear_is_refused_where_its_scale_would_change():
    """Each element is clipped: rows are independent, but parts are divided by all weight later."""

    @jax.custom_vjp
    def bounded(y):
        return y

    bounded.defvjp(lambda y: (y, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))

    def loss(p, x, k):
        return sk.Mean((bounded(mlp(p, x)) ** 2).sum(), (x > 0).sum())

    for options in {"accumulate": 2}, {"mode": "shard_map"}, {"precision": REDUCE}:
        with pytest.raises(StepError, match="is not linear in the gradient, whose size depends"):
            compiled(loss, **options)
    x = np.random.default_rng(0).normal(size=X.shape).astype("f")
    want = jax.grad(lambda p: (mean := loss(p, x, None)).total / mean.weight)(W)["w"]
    for step in compiled(loss), compiled(loss, devices=1, mode="shard_map"):
        got = step.gradients(step.init(jax.random.key(0)), x)[1]["w"]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def of_mean(loss):
    return loss.total / loss.weight if isinstance(loss, sk.Mean) else loss


def in_loops_and_systems(p, x, k):
    def one(row):
        system = (p["w"] * row) @ (p["w"] * row).T + jnp.eye(4)
        return mlp(p, row + iterated(p, row)) * jnp.linalg.solve(system, row)

    return jnp.mean(jax.vmap(one)(x) ** 2)


def solved_by_one_matrix(p, x, k):
    """With fewer rows in a part than unknowns, and more in all."""
    factor = jax.scipy.linalg.cho_factor(p["w"] @ p["w"].T + jnp.eye(4))
    return jnp.mean(jnp.sum(x * jax.scipy.linalg.cho_solve(factor, x.T).T, -1))


def solved_by_steps(p, x, k):
    """Conjugate gradients end where a residual is small beside a right side, of a gradient too."""
    system = p["w"] @ p["w"].T + jnp.eye(4)
    solve = jax.vmap(lambda row: jax.scipy.sparse.linalg.cg(lambda v: system @ v, row)[0])
    return jnp.mean(mlp(p, solve(x)) ** 2)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"mode": "shard_map"}], ids=str)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x, k: jnp.mean(in_turn(p, x) ** 2),
        in_loops_and_systems,
        *(lambda p, x, k, loss=loss: loss(p, x) for loss in NUMBERED.values()),
        solved_by_one_matrix,
        solved_by_steps,
        lambda p, x, k: jnp.sum((mlp(p, x) - 1) ** 2) / 64,
        lambda p, x, k: jnp.sum((mlp(p, x) - 1) ** 2),
        lambda p, x, k: sk.Mean(jnp.sum((mlp(p, x) - 1) ** 2), 16.0),
        lambda p, x, k: jnp.mean(mlp(p, x) ** 2) / len(x),
    ],
    ids=[
        "in turn",
        "loops and systems",
        *NUMBERED,
        "one matrix",
        "cg",
        "/ 64",
        "sum",
        "Mean",
        "1 / n",
    ],
)
def test_losses_of_each_row_give_the_gradients_of_one_device(loss, options):
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("f")
    params = {"w": np.random.default_rng(1).normal(size=(4, 4)).astype("f")}
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: params,
        batch=x,
        mesh=sk.MeshSpec(data=2, fsdp=2).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data() | sk.strategies.fsdp(min_size=1),
        **options,
    )
    metrics, got = step.gradients(step.init(jax.random.key(0)), x)
    value, want = jax.value_and_grad(lambda p: of_mean(loss(p, jnp.asarray(x), None)))(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    # In units of the largest entry: a sum's gradients are 64 times a mean's, and so are the
    # roundings of an entry in which large terms cancel.
    unit = np.abs(want["w"]).max()
    np.testing.assert_allclose(got["w"] / unit, want["w"] / unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        (lambda g: jnp.maximum(g, 0), RowSum(SCALE_DEGREE)),
        (lambda g: g * (g > 0) + jnp.abs(g), RowSum(SCALE_DEGREE)),
        (lambda g: jnp.sqrt(g**2), RowSum(SCALE_DEGREE)),
        (jnp.sign, RowSum(1)),
        (lambda g: jnp.maximum(g, 1), None),
        (lambda g: g * (g > 1), None),
        (jnp.tanh, None),
        (lambda g: g - g.min(0), None),
    ],
)
def test_a_function_of_a_gradient_scales_with_it_or_is_refused(rule, state):
    @jax.custom_vjp
    def changed(y):
        return y

    changed.defvjp(lambda y: (y, None), lambda _, g: (rule(g),))

    def run(p, scale, x):
        return jax.grad(lambda p: scale * jnp.mean(changed(mlp(p, x)) ** 2))(p)["w"]

    few, many = (jax.make_jaxpr(run)(W, 1.0, jnp.ones((n, 4))) for n in TWICE)
    inputs = [Constant(), Constant(), Constant(SCALE_DEGREE), PerRow(0)]
    (gradient,) = follow_rows(few, many, inputs, TWICE)
    assert gradient == state or (state is None and isinstance(gradient, Mixed))


def test_a_custom_gradient_that_mixes_rows_is_seen_in_the_gradient():
    value, gradient = followed(
        loss_and_gradients(lambda p, x, k: jnp.mean(clipped(mlp(p, x)) ** 2)), X
    )
    assert value == RowSum(0)
    assert isinstance(gradient, Mixed)


def test_a_derivative_rule_that_parts_alone_would_take_is_refused():
    """What has no rule on all rows is not differentiated: parts must run the same program."""

    def loss(p, x, k):
        y = mlp(p, x)
        return jnp.mean((y if len(x) == ROWS else clipped(y)) ** 2)

    with pytest.raises(StepError, match="changes with the number of rows"):
        compiled(loss, devices=1, accumulate=2)


@pytest.mark.parametrize("order", [None, [(0, 1), (0, 1)]])
def test_products_whose_order_the_rows_decide_have_one_order_by_the_fix(order):
    options = {} if order is None else {"optimize": order}

    def loss(p, x, k):
        return jnp.mean(jnp.einsum("bd,de,ef->bf", x, p["w"], p["w"], **options))

    (state,) = followed(loss, X, rows=RowCounts(2, 16))
    if order:
        assert state == RowSum(0)
    else:
        assert "jnp.einsum(..., optimize=[(0, 1), (0, 1)])" in state.cause.fix


def test_a_ratio_of_sums_is_known_as_one():
    def masked(p, x, m, k):
        return jnp.sum(jnp.sum(mlp(p, x) ** 2, -1) * m) / jnp.sum(m)

    (state,) = followed(masked, SEQUENCE, jax.ShapeDtypeStruct((ROWS, 8), jnp.float32))
    assert isinstance(state, Mixed)
    assert state.cause.ratio


def by_root(x):
    """A factor that grows with the rows by no whole power."""
    return len(x) ** 0.5


@pytest.mark.parametrize(
    "mean",
    [
        lambda p, x: sk.Mean(jnp.sum(mlp(p, x)) * by_root(x), by_root(x)),
        lambda p, x: sk.Mean(jnp.sum(mlp(p, x)) * by_root(x), jnp.sum(x**2) / by_root(x)),
        lambda p, x: sk.Mean(jnp.mean(mlp(p, x)) * len(x) ** 4, len(x) ** 3.0),
    ],
    ids=["sum", "sum of weights", "high powers"],
)
def test_two_numbers_that_grow_by_no_known_power_are_no_mean(mean):
    why = "a number that depends on how many rows there are|something that depends on their number"
    for name, loss in (
        ("loss", lambda p, x, k: mean(p, x)),
        ("metrics", lambda p, x, k: (jnp.mean(mlp(p, x)), {"own": mean(p, x)})),
    ):
        with pytest.raises(StepError, match=f"{name}.*({why})"):
            compiled(loss, accumulate=2)


@pytest.mark.parametrize(
    ("loss", "state"),
    [
        (lambda p, x, k: jnp.sum(mlp(p, x)), RowSum(1)),
        (lambda p, x, k: jnp.sum(mlp(p, x)) / ROWS, RowSum(1)),
        (lambda p, x, k: jnp.mean(mlp(p, x)) / len(x), RowSum(-1)),
        (lambda p, x, k: jnp.float32(len(x)), Constant(1)),
        (lambda p, x, k: jnp.zeros(2).at[jnp.ones(len(x), int)].add(3.0)[1], Constant(1)),
        (lambda p, x, k: jnp.zeros(()), AlwaysZero()),
        (lambda p, x, k: p["w"].sum(), Constant(0)),
    ],
)
def test_how_a_value_grows_with_the_rows(loss, state):
    assert followed(loss, X) == [state]


def errors(p, x):
    return jnp.mean(mlp(p, x) ** 2, -1)


# Each is one thing on 16 rows and more, and another on fewer.
BY_SIZE = {
    "at least": lambda p, x, k: errors(p, x).sum() / max(len(x), 16),
    "a factor": lambda p, x, k: errors(p, x).mean() * (1 if len(x) >= 16 else 0.5),
    "a branch": lambda p, x, k: errors(p, x)[: len(x) // 16 * 16 or 1].sum() / len(x),
    "a size": lambda p, x, k: errors(p, x).reshape(-1, 16).mean(),
}


@pytest.mark.parametrize(
    "options", [{"accumulate": 4}, {"mode": "shard_map"}, {"precision": REDUCE}], ids=str
)
@pytest.mark.parametrize("name", BY_SIZE)
def test_a_loss_is_followed_on_the_rows_of_a_part(name, options):
    with pytest.raises(StepError, match="The rows of the batch cannot be split") as told:
        compiled(BY_SIZE[name], batch=jax.ShapeDtypeStruct((32, 4), jnp.float32), **options)
    assert "the whole batch at once" in str(told.value)


def counted_in_a_loop(p, x, k):
    """Divides by a number that a loop of as many turns as rows makes."""
    turns = jax.lax.while_loop(lambda n: n < len(x), lambda n: n + 1, jnp.int32(1))
    return jnp.sum(mlp(p, x)) / turns


def every_other(y, is_so):
    """Every other column, or all: then without strides, as JAX has it where all are 1."""
    return jax.lax.slice(y, (0, 0), y.shape, (1, 2) if is_so else None)


# Each takes 4 of the rows, which are all rows of a part of 4; or does something else with more.
OF_A_PART = {
    "factor": lambda p, x, k: jnp.mean(mlp(p, x)) * jnp.where(len(x) >= 16, 1.0, 0.5),
    "factor by a sum": lambda p, x, k: (
        jnp.mean(mlp(p, x)) * jnp.where(jnp.sum(jnp.ones_like(x)) > 40, 1.0, 0.5)
    ),
    "branch": lambda p, x, k: jax.lax.cond(len(x) >= 16, jnp.sum, jnp.mean, mlp(p, x)),
    "column": lambda p, x, k: jnp.mean(mlp(p, x)[:, len(x) // 16]),
    "column, sliced": lambda p, x, k: jnp.mean(
        jax.lax.dynamic_slice_in_dim(mlp(p, x), jnp.int32(len(x) // 16), 1, 1)
    ),
    "columns, looked up": lambda p, x, k: jnp.mean(mlp(p, x)[:, jnp.array([0, len(x) // 16])]),
    "window": lambda p, x, k: jnp.mean(
        jax.lax.reduce_window(mlp(p, x), 0.0, jax.lax.add, (1, len(x) // 8 or 1), (1, 1), "SAME")
    ),
    "loop": counted_in_a_loop,
    "strides": lambda p, x, k: jnp.mean(every_other(mlp(p, x), len(x) >= 16).max(1)),
    "strides of a part": lambda p, x, k: jnp.mean(every_other(mlp(p, x), len(x) < 16).max(1)),
    "parts of columns": lambda p, x, k: jnp.mean(
        jnp.split(mlp(p, x), [max(1, len(x) // 16)], 1)[1].max(1)
    ),
    "stacked": lambda p, x, k: jnp.mean(mlp(p, x)) + jnp.sum(jnp.stack([p["w"]] * len(x))),
    "unstacked": lambda p, x, k: jnp.mean(mlp(p, x)) + jnp.sum(next(iter(x))),
    "groups": lambda p, x, k: jnp.mean(mlp(p, x).reshape(-1, 4, 4).mean(0) ** 2),
    "taken": lambda p, x, k: jnp.mean(mlp(p, jax.lax.dynamic_slice(x, (0, 0), (4, 4)))),
    "shifted": lambda p, x, k: jnp.mean(mlp(p, jnp.concatenate([x, x**2])[4 : 4 + len(x)])),
    "padded": marked(lambda zeros: jnp.pad(jnp.ones((4, 1)), ((0, len(zeros) - 4), (0, 0)))),
    "overwritten": marked(
        lambda zeros: jax.lax.dynamic_update_slice(zeros, jnp.ones((4, 1)), (0, 0))
    ),
}


@pytest.mark.parametrize("name", OF_A_PART)
def test_an_operation_is_followed_on_the_rows_of_a_part_and_on_all(name):
    assert isinstance(followed(OF_A_PART[name], X, rows=RowCounts(4, 32))[0], Mixed)


@jax.custom_vjp
def of_nothing(y):
    """Zero with a gradient, as losses whose gradient is made by hand."""
    return jnp.zeros(())


of_nothing.defvjp(lambda y: (jnp.zeros(()), y), lambda y, g: (g * y,))


def soft(p, x):
    return jax.nn.sigmoid(x[:, 0] * p["w"][0, 0])


def squeezed(p, x, k):
    """Each row by itself, where a dim of one row does not go with the others."""
    return jnp.mean(jax.vmap(lambda row: jnp.sum(row**2))(jnp.squeeze(x[:, None] @ p["w"])))


REFUSED = {
    "a part of one row": (squeezed, "does one thing with one row, another with more"),
    "gradient of zero": (lambda p, x, k: of_nothing(mlp(p, x)), "unlike the loss"),
    "place of a device": (
        lambda p, x, k: jnp.mean(mlp(p, x)) * (1 + jax.lax.axis_index("batch")),
        "axis_index is the place of a device",
    ),
    "weight of parameters": (
        lambda p, x, k: sk.Mean(jnp.sum(errors(p, x) * soft(p, x)), jnp.sum(soft(p, x))),
        "no gradient through its weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_or_means_would_change_in_silence_is_refused(name):
    loss, why = REFUSED[name]
    with pytest.raises(StepError, match=why):
        compiled(loss, batch=jax.ShapeDtypeStruct((2, 4), jnp.float32), devices=2, mode="shard_map")


def attended(p, x, k):
    """Every row by itself: JAX squeezes the dim of a single row in products and brings it back."""
    q = x[:, None, :, None] * p["w"][0]
    scores = jax.nn.softmax(q @ q.swapaxes(-1, -2), -1)
    return jnp.mean((scores @ q) ** 2)


def test_products_of_a_part_of_one_row_are_no_squeeze():
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("f")
    step = compiled(attended, batch=x, devices=2, mode="shard_map")
    _, got = step.gradients(step.init(jax.random.key(0)), x)
    np.testing.assert_allclose(
        got["w"], jax.grad(lambda p: attended(p, x, None))(W)["w"], rtol=1e-5, atol=1e-6
    )


def test_a_weight_whose_gradient_is_stopped_is_a_weight():
    def loss(p, x, k):
        weight = jax.lax.stop_gradient(soft(p, x))
        return sk.Mean(jnp.sum(errors(p, x) * weight), jnp.sum(weight))

    x = np.random.default_rng(0).normal(size=(8, 4)).astype("f")
    step = compiled(loss, batch=x, devices=2, accumulate=2)
    _, got = step.gradients(step.init(jax.random.key(0)), x)
    want = jax.grad(lambda p: of_mean(loss(p, jnp.asarray(x), None)))(W)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("primitive", [constrain_p, use_param_p], ids=str)
def test_the_marks_of_a_model_leave_rows_as_they_are(primitive):
    assert RULES[primitive.name] is RULES["copy"]


# Of newer versions of JAX than the oldest that is supported.
_NEWER = {"log2", "one_minus_square"}


def test_every_rule_is_of_an_operation_that_jax_has():
    has = {x.name for x in gc.get_objects() if isinstance(x, core.Primitive)}
    named = {*RULES, *_FIRST, *_LOOKUPS, *_IDENTITIES, *_COUNTED}
    named |= {*_RULES, *KEEPS_PARTIAL, *MATERIALIZED, *STAYS_PARTIAL}
    assert named - has <= _NEWER
