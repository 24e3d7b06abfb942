"""The mixture of experts on one device: routing, slots, drops, products, losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardkit as sk
from shardkit.lm import (
    SIZES,
    Decoder,
    DecoderConfig,
    decoder_loss,
    parameter_count,
    router_statistics,
    swiglu,
)
from shardkit.nn._expert_dispatch import assign_slots, sort_by_expert

B, T, E, X, F, K = 3, 10, 8, 4, 6, 2
CONFIG = DecoderConfig(
    vocab=32,
    embed_dim=E,
    num_layers=2,
    num_heads=2,
    mlp_dim=12,
    experts=X,
    expert_mlp=F,
    capacity_factor=0.7,
)


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"gate": (X, E, F), "up": (X, E, F), "down": (X, F, E)}
    weights = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    choice, share = sk.nn.route(2 * jax.random.normal(keys[3], (B, T, X)), K)
    return jax.random.normal(keys[4], (B, T, E)), choice, share, weights


def kept(choice, capacity):
    """Whether each choice finds room, one token after another."""
    found = np.ones(choice.shape, bool)
    for b in range(B):
        taken = [0] * X
        for t, k in np.ndindex(T, K):
            e = int(choice[b, t, k])
            taken[e] += 1
            found[b, t, k] = capacity is None or taken[e] <= capacity
    return found


def naive(x, choice, share, weights, found):
    """Every expert computes every token; shares of those not chosen, or full, are 0."""
    every = swiglu(weights, jnp.broadcast_to(x.reshape(-1, E), (X, B * T, E)), jnp.matmul)
    shares = jnp.einsum("btkx,btk->btx", jax.nn.one_hot(choice, X), share * found)
    return jnp.einsum("btx,xbte->bte", shares, every.reshape(X, B, T, E))


@pytest.mark.parametrize("capacity", [None, 3])
def test_outputs_and_gradients_equal_those_of_every_expert_on_every_token(capacity):
    x, choice, share, weights = inputs()
    found = kept(choice, capacity)
    assert found.all() == (capacity is None)

    def loss(of):
        return lambda x, share, weights: (of(x, choice, share, weights) ** 2).sum()

    plain = loss(lambda x, c, s, w: sk.nn.experts(x, c, s, w, swiglu, capacity=capacity))
    full = loss(lambda x, c, s, w: naive(x, c, s, w, found))
    arguments = (x, share, weights)
    both = jax.jit(lambda *a: [jax.value_and_grad(of, (0, 1, 2))(*a) for of in (plain, full)])
    close(*both(*arguments), 1e-5)


def close(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def test_mapping_over_lanes_and_over_weights_changes_nothing():
    x, choice, share, weights = inputs()

    def loss(weights, x, choice, share):
        return (sk.nn.experts(x[None], choice[None], share[None], weights, swiglu) ** 2).sum()

    one, copies = jax.value_and_grad(loss), jax.tree.map(lambda w: jnp.stack([w] * B), weights)

    @jax.jit
    def run():
        apart = [one(weights, x[b], choice[b], share[b]) for b in range(B)]
        lanes = jax.vmap(one, (None, 0, 0, 0))(weights, x, choice, share)
        ensemble = jax.vmap(one)(copies, x, choice, share)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *apart), lanes, ensemble

    want, lanes, ensemble = run()
    close(lanes, want, 1e-5)
    close(ensemble, want, 1e-5)


def test_rows_without_a_bin_come_last():
    row, place, sizes = sort_by_expert(jnp.array([2, 0, 1, 0, 2]), 2)
    assert row.tolist() == [1, 3, 2, 0, 4]
    assert place.tolist() == [3, 0, 2, 1, 4]
    assert sizes.tolist() == [2, 1]


def test_a_token_depends_on_no_later_one():
    x, choice, share, weights = inputs()
    whole = sk.nn.experts(x, choice, share, weights, swiglu, capacity=3)
    other = choice.at[:, 6:].set((choice[:, 6:] + 1) % X)
    changed = sk.nn.experts(x, other, share, weights, swiglu, capacity=3)
    np.testing.assert_array_equal(whole[:, :6], changed[:, :6])
    assert not np.array_equal(whole[:, 6:], changed[:, 6:])


def test_one_choice_keeps_its_probability():
    logits = jax.random.normal(jax.random.key(0), (5, X))
    choice, share = sk.nn.route(logits, 1)
    np.testing.assert_allclose(share[:, 0], jax.nn.softmax(logits).max(-1), rtol=1e-6)
    assert choice[:, 0].tolist() == logits.argmax(-1).tolist()
    grads = jax.grad(lambda z: sk.nn.route(z, 1)[1].sum())(logits)
    assert float(jnp.abs(grads).max()) > 0.01


def test_the_best_experts_are_chosen_best_first():
    logits = jax.random.normal(jax.random.key(1), (50, X))
    choice, share = sk.nn.route(logits.astype(jnp.bfloat16), 3)
    best, _ = jax.lax.top_k(logits.astype(jnp.bfloat16).astype(jnp.float32), 3)
    picked = jnp.take_along_axis(logits.astype(jnp.bfloat16).astype(jnp.float32), choice, -1)
    np.testing.assert_array_equal(picked, best)
    assert share.dtype == jnp.float32
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-6)


def test_statistics_by_hand():
    p = jnp.array([[[0.5, 0.5], [0.75, 0.25]]])
    choice = jnp.array([[[0], [0]]])
    rows = router_statistics(jnp.log(p) + 1.0, choice, 1, jnp.array([[1.0, 3.0]]))
    sums = {name: x[0] for name, x in rows.items()}
    assert float(sums["balance"]) == pytest.approx(2 * 4 * (0.5 + 3 * 0.75) / 4)
    assert float(sums["max_load"]) == pytest.approx(2 * 4)
    assert float(sums["dropped"]) == 3.0  # the second token, which counts thrice, found it full
    assert float(sums["z"]) == pytest.approx(4.0)  # logsumexp is 1 everywhere
    entropy = -(p * jnp.log(p)).sum(-1)[0]
    assert float(sums["entropy"]) == pytest.approx(float(entropy[0] + 3 * entropy[1]))


def test_perfect_balance_is_one():
    choice = jnp.tile(jnp.arange(X), 2).reshape(1, X, 2)
    sums = router_statistics(jnp.zeros((1, X, X)), choice, None)
    assert float(sums["balance"][0]) / X == pytest.approx(1)
    assert float(sums["max_load"][0]) / X == pytest.approx(1)


@functools.cache
def decoder():
    """Compiled: batch → (training loss, metrics), gradients, and the loss of evaluation."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, nnx.Rngs(0))), nnx.Param)

    def run(params, batch, evaluating):
        model = nnx.merge(graph, params)
        model.deterministic = evaluating
        mean, metrics = decoder_loss(model, batch, None)
        return mean.total / mean.weight, {k: m.total / m.weight for k, m in metrics.items()}

    @jax.jit
    def both(batch):
        params = nnx.state(Decoder(CONFIG, nnx.Rngs(0)), nnx.Param)
        trained = jax.value_and_grad(lambda p: run(p, batch, False), has_aux=True)(params)
        return *trained, run(params, batch, True)[0]

    return both


def batch_of(seed=0):
    ids = np.random.default_rng(0).integers(0, 32, (4, 13)).astype(np.int32)
    ids[3] = np.random.default_rng(seed).integers(0, 32, 13)
    weights = np.ones((4, 12), np.float32)
    weights[3] = 0
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


def test_tokens_that_do_not_count_leave_loss_and_metrics_alone():
    (loss, metrics), grads, _ = decoder()(batch_of(1))
    (other, others), other_grads, _ = decoder()(batch_of(2))
    assert metrics["dropped"] > 0.05
    np.testing.assert_array_equal(loss, other)
    assert metrics == others
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_router_losses_belong_to_training():
    (training, metrics), grads, evaluation = decoder()(batch_of())
    least = CONFIG.num_layers * CONFIG.balance_loss * float(metrics["balance"])
    assert float(training - evaluation) > 0.99 * least
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_shared_experts_are_one_dense_branch():
    alone = DecoderConfig(
        vocab=32, embed_dim=E, num_layers=2, num_heads=2, mlp_dim=12, experts=X, expert_mlp=F
    )
    both = dataclasses.replace(alone, shared_experts=2)
    assert parameter_count(both) - parameter_count(alone) == 2 * 3 * E * 2 * F


def test_biases_are_those_of_the_dense_branch():
    plain = DecoderConfig(
        vocab=32, embed_dim=E, num_layers=2, num_heads=2, mlp_dim=12, experts=X, expert_mlp=F
    )
    attention = 2 * (4 * E)  # of query, key, value and out, in 2 layers
    more = parameter_count(dataclasses.replace(plain, bias=True)) - parameter_count(plain)
    assert more == attention
    shared = dataclasses.replace(plain, shared_experts=1)
    more = parameter_count(dataclasses.replace(shared, bias=True)) - parameter_count(shared)
    assert more == attention + 2 * (F + F + E)


def test_published_sizes():
    assert parameter_count(SIZES["mixtral-8x7b"]) == 46_702_792_704


MISTAKES = {
    "top_k": ({"experts": 4, "top_k": 5}, "a token cannot choose more than experts=4", "top_k=4"),
    "capacity": (
        {"experts": 4, "capacity_factor": 0.0},
        "capacity_factor=0.0  an expert would take no token; None drops none",
        "capacity_factor=1.25, or None",
    ),
    "none": ({"capacity_factor": 1.0}, "the decoder has no experts", "experts=8"),
    "shared": ({"experts": 4, "shared_experts": -1}, "at least 0", "shared_experts=0"),
    "experts": ({"experts": 0}, "experts=0  must be at least 1", "experts=1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_sizes_that_do_not_fit_are_named_with_a_fix(name):
    changes, why, fix = MISTAKES[name]
    with pytest.raises(sk.errors.ConfigError) as raised:
        DecoderConfig(vocab=32, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, **changes)
    assert why in str(raised.value)
    assert f"Fix: {fix}" in str(raised.value)


def test_arrays_that_do_not_fit_are_named_all_at_once():
    x, choice, share, weights = inputs()
    with pytest.raises(sk.errors.StepError) as raised:
        sk.nn.experts(
            x, choice, share[:1], {**weights, "bias": jnp.ones((3, 2))}, swiglu, capacity=0
        )
    message = str(raised.value)
    assert "choices (3, 10, 2), shares (1, 10, 2)" in message
    assert "leaves have [(3,), (4,)] experts in dim 0" in message
    assert "capacity=0" in message


def test_slots_of_several_groups():
    slot, row = assign_slots(jnp.array([[0, 0, 1], [1, 1, 1]]), 2, 2)
    assert slot.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert row.tolist() == [[0, 1, 2, 3], [3, 3, 0, 1]]
