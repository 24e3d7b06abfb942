"""FLOPs from the jaxpr against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardkit.lm._cross_entropy import cross_entropy
from shardkit.nn._attention import attention
from shardkit.report import count_flops

LAYERS, BATCH, WIDTH, HIDDEN = 3, 4, 8, 16
PAIR = 2 * 2 * BATCH * WIDTH * HIDDEN  # a column-row pair, forward


def layer(x, w):
    with jax.named_scope("mlp"):
        return x + jnp.tanh(x @ w[0]) @ w[1], None


def loss(params, x, body=layer):
    with jax.named_scope("loss"):
        return jnp.sum(jax.lax.scan(body, x, params)[0] ** 2)


PARAMS = jnp.ones((LAYERS, WIDTH, HIDDEN)), jnp.ones((LAYERS, HIDDEN, WIDTH))
X = jnp.ones((BATCH, WIDTH))


def flops_of(f, *args):
    return count_flops(jax.make_jaxpr(f)(*args))


def test_a_scan_counts_every_trip():
    flops = flops_of(loss, PARAMS, X)
    assert flops.complete
    assert (flops.model, flops.recompute) == (LAYERS * PAIR, 0)
    assert flops.by_scope == {("mlp", "forward"): LAYERS * PAIR}


def test_the_backward_pass_is_twice_the_forward():
    flops = flops_of(jax.grad(loss, (0, 1)), PARAMS, X)
    assert flops.model == 3 * LAYERS * PAIR
    assert flops.by_scope == {
        ("mlp", "backward"): 2 * LAYERS * PAIR,
        ("mlp", "forward"): LAYERS * PAIR,
    }


def test_what_backward_passes_by_hand_compute_again_is_apart():
    rows, length, embed, vocab, heads, dim = 2, 8, 16, 32, 2, 8
    targets = jnp.zeros((rows, length), int)

    def nats(hidden, table, chunks):
        lse, label, _ = cross_entropy(hidden, table, targets, chunks)
        return jnp.sum(lse - label)

    arrays = jnp.ones((rows, length, embed)), jnp.ones((embed, vocab))
    logits = 2 * rows * length * embed * vocab
    for chunks, again in ((1, 0), (4, logits)):
        flops = flops_of(jax.grad(functools.partial(nats, chunks=chunks), (0, 1)), *arrays)
        assert (flops.model, flops.recompute) == (3 * logits, again)

    def mixed(q, k, v):
        return jnp.sum(attention(q, k, v, causal=False, implementation="blocked"))

    scores = 2 * rows * heads * length * length * dim
    q = jnp.ones((rows, length, heads, dim))
    flops = flops_of(jax.grad(mixed, (0, 1, 2)), q, q, q)
    assert (flops.model, flops.recompute) == (3 * 2 * scores, scores)


def test_recomputation_is_apart():
    remat = jax.checkpoint(layer)
    flops = flops_of(jax.grad(functools.partial(loss, body=remat), (0, 1)), PARAMS, X)
    assert flops.model == 3 * LAYERS * PAIR
    # The second product's result is needed by no gradient, so only the first is repeated.
    assert flops.recompute == LAYERS * PAIR // 2
    assert flops.by_scope["mlp", "recompute"] == LAYERS * PAIR // 2
    assert flops.total == flops.model + flops.recompute


def test_accumulation_and_jit_multiply_through():
    def step(params, xs):
        return jax.lax.scan(lambda c, x: (c + jax.jit(loss)(params, x), None), 0.0, xs)[0]

    assert flops_of(step, PARAMS, jnp.ones((5, BATCH, WIDTH))).model == 5 * LAYERS * PAIR


def test_a_shard_map_counts_all_devices():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(None, "tensor")),
        out_specs=P("data", "tensor"),
    )
    def product(x, w):
        return x @ w

    flops = flops_of(product, jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, HIDDEN)))
    assert flops.model == 2 * BATCH * WIDTH * HIDDEN


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    forward = 2 * 2 * (8 // stride) ** 2 * 5 * 3 * 3 * 3
    assert flops_of(conv, x, k).model == forward
    both = flops_of(jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1)), x, k)
    assert both.model == 3 * forward


def test_a_branch_counts_its_largest():
    def f(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w, lambda: (x @ w) @ w.T @ w)

    flops = flops_of(f, True, jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, HIDDEN)))
    assert flops.model == 3 * 2 * BATCH * WIDTH * HIDDEN


def test_custom_derivatives_count_once():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    args = jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, HIDDEN))
    one = 2 * BATCH * WIDTH * HIDDEN
    assert flops_of(f, *args).model == one
    assert flops_of(jax.value_and_grad(lambda x, w: f(x, w).sum(), (0, 1)), *args).model == 3 * one
    # The rule computes the gradient of a frozen weight too, which nothing uses.
    assert flops_of(jax.value_and_grad(lambda x, w: f(x, w).sum()), *args).model == 2 * one


def test_what_cannot_be_counted_is_reported():
    def f(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

    flops = flops_of(f, jnp.ones((BATCH, WIDTH)), jnp.ones((WIDTH, WIDTH)))
    assert not flops.complete
    assert "an unknown number of times" in flops.problems[0]
    assert flops.model == 2 * BATCH * WIDTH * WIDTH

    # A loop without products hides nothing.
    halve = functools.partial(jax.lax.while_loop, lambda x: jnp.sum(x) > 1, lambda x: x / 2)
    assert flops_of(halve, X).complete


def test_a_kernel_is_reported():
    def double(x, out):
        out[...] = 2 * x[...]

    def f(x):
        with jax.named_scope("fused"):
            return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert flops_of(f, X).problems == ("the kernel pallas_call in fused is not counted",)
