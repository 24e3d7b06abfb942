"""Parts of one row: JAX writes another program for them, and the loss must not mean another one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.errors import StepError
from shardkit.step.rows._equation import RowCounts
from shardkit.step.rows._one_row import compare_with_one_row

from ._quick import some_quick
from .test_rows import MEANS, SEQUENCE, W, X, loss_and_gradients, mlp, traced

FEW, MANY = 2, 6


def compared(function, *batch):
    """What the program of `function(params, *batch, key)` does with one row alone, or None."""
    one, few, many = (traced(function, batch, rows) for rows in (1, FEW, MANY))
    return compare_with_one_row(one, few, many, RowCounts(FEW, MANY))


def systems(p, x):
    """A positive definite matrix for each row, and its right side."""
    y = x[:, :4] @ p["w"]
    return y @ y.swapaxes(1, 2) + jnp.eye(4), y[..., :1]


SOLVED = {
    "solve": lambda a, y: jnp.linalg.solve(a, y),
    "inverse": lambda a, y: jnp.linalg.inv(a),
    "determinant": lambda a, y: jnp.linalg.slogdet(a)[1],
    "cholesky": lambda a, y: jnp.linalg.cholesky(a),
    "singular values": lambda a, y: jnp.linalg.svd(a, compute_uv=False),
}


@pytest.mark.parametrize("name", SOLVED)
def test_matrices_of_one_row_are_those_of_several(name):
    loss = loss_and_gradients(lambda p, x, k: jnp.mean(SOLVED[name](*systems(p, x))))
    assert compared(loss, SEQUENCE) is None


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_rows_and_its_gradients_are_the_same_program_on_one_row(name):
    loss, batch = MEANS[name]
    assert compared(loss_and_gradients(loss), *batch) is None


def squares(y):
    return jnp.sum(y**2)


# Each means something else where there is one row, and the same for any other number of them.
OTHERS = {
    "branch": (lambda p, x: jnp.mean(mlp(p, x) ** (2 if len(x) > 1 else 3)), "integer_pow"),
    "no operation": (lambda p, x: jnp.mean(mlp(p, x) ** 2 if len(x) > 1 else mlp(p, x)), "reduce"),
    "factor": (lambda p, x: jnp.mean(mlp(p, x)) * (1.0 if len(x) > 1 else 2.0), "mul"),
    "number in a choice": (
        lambda p, x: jnp.mean(jnp.where(x > 0, mlp(p, x), 1.0 if len(x) > 1 else 2.0)),
        "convert_element_type",
    ),
    "number in a loop": (
        lambda p, x: jax.lax.fori_loop(
            0, 3, lambda i, total: total * (1.0 if len(x) > 1 else 2.0), jnp.mean(mlp(p, x))
        ),
        "scan",
    ),
    "turns of a loop": (
        lambda p, x: jnp.mean(
            jax.lax.fori_loop(0, 3 if len(x) > 1 else 2, lambda i, y: jnp.tanh(y), mlp(p, x))
        ),
        "scan",
    ),
    "operand": (lambda p, x: jnp.mean(jnp.tanh(mlp(p, x) if len(x) > 1 else x)), "tanh"),
    "result": (lambda p, x: [jnp.mean(x), jnp.sum(p["w"])][len(x) == 1], "the program"),
    "dim of a sort": (lambda p, x: jnp.mean(jnp.sort(mlp(p, x), len(x) > 1)[:, :2]), "sort"),
    "dim of a maximum": (
        lambda p, x: jnp.mean(jnp.max(x[..., None] * p["w"], 1 if len(x) > 1 else 2)),
        "reduce_max",
    ),
    "columns": (lambda p, x: jnp.mean(mlp(p, x)[:, :2] if len(x) > 1 else x[:, 2:]), "slice"),
    "look-up": (
        lambda p, x: jnp.mean(p["w"][jnp.argmax(x, 1)] if len(x) > 1 else p["w"][:, x.argmax(1)]),
        "gather",
    ),
    "turned weight": (
        lambda p, x: jnp.mean(jnp.tanh(x @ (p["w"] if len(x) > 1 else p["w"].T))),
        "transpose",
    ),
    "product": (
        lambda p, x: jnp.mean(jnp.einsum("bi,ij->bj" if len(x) > 1 else "bi,ji->bj", x, p["w"])),
        "dot_general",
    ),
    "two for one": (
        lambda p, x: jnp.mean(mlp(p, x) + jnp.ones((2 if len(x) == 1 else 1, 1))),
        "broadcast",
    ),
    "squeezed": (lambda p, x: jnp.mean(jax.vmap(squares)(jnp.squeeze(x[:, None]))), "div"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_one_row_alone_does_is_named(name):
    loss, operation = OTHERS[name]
    mixed = compared(lambda p, x, k: loss(p, x), X)
    assert mixed.cause.operation.startswith(operation)
    assert operation == "the program" or mixed.cause.where.startswith("test_one_row.py:")


def binary(logits, x):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, x[:, 0] > 0))


RIGHT = {
    "logits squeezed": lambda p, x, k: binary(jnp.squeeze(mlp(p, x)[:, :1]), x),
    "integer labels": lambda p, x, k: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(mlp(p, x), jnp.argmax(x, -1))
    ),
    "normal": lambda p, x, k: jnp.mean(optax.losses.cosine_distance(jax.nn.relu(mlp(p, x)), x)),
}
HOW = {"devices": (4, {"mode": "shard_map"}), "micro-batches": (1, {"accumulate": 4})}


@pytest.mark.parametrize("how", some_quick(HOW, "devices"))
@pytest.mark.parametrize("name", some_quick(RIGHT, "logits squeezed"))
def test_parts_of_one_row_give_the_gradients_of_one_device(name, how):
    loss, (devices, options) = RIGHT[name], HOW[how]
    x = np.random.default_rng(0).normal(size=(4, 4)).astype("f")
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: W,
        batch=x,
        mesh=sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices]),
        strategy=sk.strategies.data(),
        **options,
    )
    metrics, got = step.gradients(step.init(jax.random.key(0)), x)
    value, want = jax.value_and_grad(lambda p: loss(p, jnp.asarray(x), None))(W)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", some_quick(HOW, "devices"))
def test_a_loss_that_means_something_else_on_one_row_is_refused_with_its_line(how):
    devices, options = HOW[how]
    with pytest.raises(StepError) as told:
        sk.compile_step(
            lambda p, x, k: jnp.mean(mlp(p, x)) * (1.0 if len(x) > 1 else 2.0),
            optax.sgd(0.1),
            init=lambda key: W,
            batch=jax.ShapeDtypeStruct((4, 4), jnp.float32),
            mesh=sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices]),
            strategy=sk.strategies.data(),
            **options,
        )
    text = str(told.value)
    assert "mul does one thing with one row, another with more (test_one_row.py:" in text
    assert "no choice by len(batch[...])" in text
