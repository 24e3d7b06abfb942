"""Unchanged models with loops in `mode="shard_map"`, against plain JAX on one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.ode import odeint
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.step.shard_map import _evaluate
from shardkit.step.shard_map._axis_types import follow_types

from ._quick import some_quick

RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.normal(size=(16, 6, 4)), jnp.float32)}
# Its state is the gradients, so that one compiled step shows them.
OPTIMIZER = optax.trace(0.0)
FSDP = sk.Strategy(params=sk.shard_largest("fsdp"), batch=P(("data", "fsdp")))


def init(key):
    u, w, v = jax.random.split(key, 3)
    return {
        "u": jax.random.normal(u, (4, 4)) / 2,
        "w": jax.random.normal(w, (4, 4)) / 2,
        "v": jax.random.normal(v, (4,)),
    }


def by_time(x):
    return jnp.swapaxes(x, 0, 1)


def zeros(batch):
    return jnp.zeros((batch["x"].shape[0], 4))


def recurrent(params, batch, key):
    def cell(h, x):
        h = jnp.tanh(h @ params["u"] + x @ params["w"])
        return h, h

    h, _ = jax.lax.scan(cell, zeros(batch), by_time(batch["x"]))
    return jnp.mean(h**2)


def state_space(params, batch, key):
    """Mamba's recurrence, by an associative scan and checkpointed cells with a custom JVP."""
    decay = jax.nn.sigmoid(batch["x"] @ params["w"])
    inner = jax.nn.silu(batch["x"] @ params["u"])

    def join(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    _, h = jax.lax.associative_scan(join, (decay, inner), axis=1)

    @jax.checkpoint
    def cell(state, both):
        decay, x = both
        state = decay * state + jax.nn.relu(x)
        return state, state * params["v"]

    _, y = jax.lax.scan(cell, zeros(batch), (by_time(decay), by_time(h)))
    return jnp.mean(y**2)


def online_softmax(params, batch, key):
    queries, keys = batch["x"] @ params["u"], batch["x"] @ params["w"]

    def block(carry, i):
        top, total, out = carry
        scores = jnp.einsum("bqd,bd->bq", queries, keys[:, i])
        new = jnp.maximum(top, scores)
        old, weight = jnp.exp(top - new), jnp.exp(scores - new)
        out = out * old[..., None] + weight[..., None] * batch["x"][:, i][:, None]
        return (new, total * old + weight, out), None

    rows = queries.shape[0]
    start = (jnp.full((rows, 6), -jnp.inf), jnp.zeros((rows, 6)), jnp.zeros((rows, 6, 4)))
    (_, total, out), _ = jax.lax.scan(block, start, jnp.arange(6))
    return jnp.mean((out / total[..., None]) ** 2)


def loops(params, batch, key):
    """`fori_loop`, `while_loop`, `cond` and `switch`, nested in a scan under a jit."""

    @jax.jit
    def layer(h, x):
        h = jax.lax.fori_loop(0, 2, lambda i, c: c + jnp.tanh(x @ params["u"]) * i, h)
        _, more = jax.lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1] + jax.lax.stop_gradient(x)),
            (0, zeros(batch)),
        )
        h = h + jax.lax.cond(params["v"][0] > -9, lambda a: a @ params["w"], jnp.ones_like, more)
        return jax.lax.switch(jnp.int32(1), [jnp.zeros_like, jnp.tanh], h)

    def body(carry, x):
        h, count = carry
        return (layer(h, x), count + 1.0), None

    (h, count), _ = jax.lax.scan(body, (zeros(batch), 0.0), by_time(batch["x"]))
    return jnp.mean(h**2) * count


@jax.custom_vjp
def running_sum(x):
    return jnp.cumsum(x, 0)


def running_sum_bwd(_, g):
    """A loop that starts from a constant, in a backward pass alone."""
    _, sums = jax.lax.scan(lambda c, t: (c + t,) * 2, jnp.zeros(g[0].shape), g, reverse=True)
    return (sums,)


running_sum.defvjp(lambda x: (jnp.cumsum(x, 0), None), running_sum_bwd)


def own_rule(params, batch, key):
    return jnp.mean(running_sum(by_time(batch["x"] @ params["u"])) ** 2)


def per_row(params, batch, key):
    """A loss of one row under `jax.vmap`, whose state does not depend on the row at first."""

    def of_row(x):
        return jax.lax.scan(lambda h, t: (jnp.tanh(h @ params["u"] + t), None), jnp.zeros(4), x)[0]

    return jnp.mean(jax.vmap(of_row)(batch["x"]) ** 2)


def ended_by_each_row(params, batch, key):
    """A while loop of one row under `jax.vmap`, beside one that starts from a constant."""

    def halved(x):
        def body(carry):
            size, turns = carry
            return size / 2, turns + 1.0

        size, turns = jax.lax.while_loop(lambda carry: carry[0] > 0.1, body, (jnp.sum(x**2), 0.0))
        return size * turns

    weights = jax.lax.stop_gradient(jax.vmap(halved)(batch["x"]))
    return recurrent(params, {"x": batch["x"] * weights[:, None, None]}, key)


def differential_equation(params, batch, key):
    """`odeint` of each row: its derivative rule refuses to be asked about its constant tables."""

    def path(x):
        def slope(y, t, w):
            return jnp.tanh(w @ y) * jnp.cos(t)

        return odeint(slope, x, jnp.linspace(0.0, 1.0, 3), params["w"])[-1]

    ends = jax.vmap(path)(batch["x"][:, 0])
    return jnp.mean((ends @ params["u"]) ** 2)


def weighted_stack(params, batch, key):
    """Layers with a recurrence each, which end in a mean with a weight."""

    def layer(weights, h, batch, key):
        def cell(state, x):
            return (jnp.tanh(state @ weights + x),) * 2

        return by_time(jax.lax.scan(cell, zeros(batch), by_time(h))[1])

    def last(params, h, batch):
        weights = (batch["x"][..., 0] > 0).astype(h.dtype)
        return sk.Mean(jnp.sum(jnp.sum((h * params["v"]) ** 2, -1) * weights), jnp.sum(weights))

    return sk.nn.layer_stack(
        lambda params, batch, key: batch["x"],
        layer,
        last,
        outer_params={"v": params["v"]},
        layers=jnp.stack([params["u"], params["w"]]),
        batch=batch,
    )


LOSSES = (recurrent, state_space, loops, own_rule, weighted_stack)


def mean_of(value):
    return value.total / value.weight if isinstance(value, sk.Mean) else value


def assert_like_one_device(loss, strategy, sizes, **options):
    mesh = sk.MeshSpec(**sizes).build()
    step = sk.compile_step(
        loss,
        OPTIMIZER,
        init=init,
        batch=BATCH,
        mesh=mesh,
        strategy=strategy,
        mode="shard_map",
        **options,
    )
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    reference = jax.value_and_grad(lambda p: mean_of(loss(p, BATCH, None)))(params)
    state, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], reference[0], rtol=1e-5)
    for name, gradient in reference[1].items():
        scale = np.abs(gradient).max() + 1e-12
        np.testing.assert_allclose(
            np.asarray(state.opt_state.trace[name]) / scale, gradient / scale, atol=1e-5
        )


@pytest.mark.parametrize(
    "loss",
    some_quick(LOSSES, recurrent, loops, own_rule, weighted_stack),
    ids=lambda loss: loss.__name__,
)
def test_loops_that_start_from_constants(loss):
    assert_like_one_device(loss, sk.strategies.data(), {"data": 8})


@pytest.mark.slow
@pytest.mark.parametrize("loss", [online_softmax, per_row], ids=lambda loss: loss.__name__)
def test_more_loops_that_start_from_constants(loss):
    assert_like_one_device(loss, sk.strategies.data(), {"data": 8})


def test_a_loop_that_each_row_ends():
    assert_like_one_device(ended_by_each_row, sk.strategies.data(), {"data": 8})


@pytest.mark.slow
def test_an_integral_of_each_row():
    """Its steps are chosen by the size of the gradient too, so parts differ within tolerance."""
    data = sk.strategies.data()
    with pytest.raises(sk.errors.StepError, match="depend on how many rows there are"):
        assert_like_one_device(differential_equation, data, {"data": 8})
    assert_like_one_device(differential_equation, data, {"data": 8}, independent_rows=True)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loops_over_gathered_weights_and_micro_batches(loss):
    assert_like_one_device(loss, FSDP, {"data": 2, "fsdp": 4})
    assert_like_one_device(loss, sk.strategies.data(), {"data": 8}, accumulate=2)


def test_loops_beside_the_models_own_collectives():
    """A recurrence over a split `mlp`: two sums over tensor, as without the loop."""

    def init(key):
        up, down, decay = jax.random.split(key, 3)
        return {
            "up": sk.WithAxes(jax.random.normal(up, (4, 8)) / 2, ("embed", "mlp")),
            "decay": sk.WithAxes(jax.random.normal(decay, (8,)), ("mlp",)),
            "down": sk.WithAxes(jax.random.normal(down, (8, 4)) / 3, ("mlp", "embed")),
        }

    def loss(params, batch, key):
        x = sk.nn.constrain(batch["x"], "batch", "length", "embed", into=("mlp",))
        h = sk.nn.constrain(x @ params["up"], "batch", "length", "mlp")
        decay = jax.nn.sigmoid(params["decay"])
        _, h = jax.lax.scan(lambda s, t: (decay * s + t,) * 2, jnp.zeros(h[:, 0].shape), by_time(h))
        y = sk.nn.constrain(
            by_time(h) @ params["down"], "batch", "length", "embed", partial=("mlp",)
        )
        return jnp.mean((y - batch["x"]) ** 2)

    mesh = sk.MeshSpec(data=2, tensor=4).build()
    strategy = sk.strategies.data() | sk.strategies.tensor()
    options = {"init": init, "batch": BATCH, "mesh": mesh, "strategy": strategy}
    step = sk.compile_step(loss, OPTIMIZER, mode="shard_map", **options)
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    gradients = jax.grad(lambda p: loss(p, BATCH, None))(params)
    state, _ = step(state, BATCH)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(state.opt_state.trace[name], gradient, atol=1e-5)
    sums = [row for row in step.report().ledger if row.axes == ("tensor",)]
    assert sum(row.payload_bytes > 100 for row in sums) == 1  # the input has no gradient


def test_a_local_loss_may_start_loops_from_constants():
    def local(params, batch, key):
        return jax.lax.pmean(recurrent(params, batch, key), "data")

    step = sk.compile_step(
        sk.ShardMapLoss(local, recurrent),
        OPTIMIZER,
        init=init,
        batch=BATCH,
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.strategies.data(),
        mode="shard_map",
    )
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    _, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], recurrent(params, BATCH, None), rtol=1e-5)


@pytest.mark.slow
def test_a_gru_of_flax():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.RNN(nn.GRUCell(8))(x))

    def loss(y, batch):
        return jnp.mean((y - batch["x"]) ** 2)

    model = sk.from_linen(Net(), loss, BATCH)
    mesh = sk.MeshSpec(data=8).build()
    step = sk.compile_step(
        model.loss_fn,
        OPTIMIZER,
        init=model.init,
        batch=BATCH,
        mesh=mesh,
        strategy=sk.strategies.data(),
        mode="shard_map",
    )
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    gradients = jax.grad(lambda p: loss(Net().apply({"params": p}, BATCH["x"]), BATCH))(params)
    state, _ = step(state, BATCH)
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state.trace), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_types_of_a_carry_grow_until_they_stay():
    """`a` takes up `b`, which takes up the rows: two turns until both vary."""

    def chain(x):
        def body(carry, x):
            a, b, c = carry
            return (a + b, b + x, c + 1), a

        return jax.lax.scan(body, (0.0, 0.0, 0.0), x)

    program = jax.make_jaxpr(chain)(jnp.ones(3))
    data, nothing = frozenset({"data"}), frozenset()
    assert follow_types(program, [data]) == ([data, data, nothing, data], True)
    assert follow_types(program, [nothing]) == ([nothing] * 4, False)


def test_without_wider_carries_jax_refuses_the_loop(monkeypatch):
    """The check that can fail: nothing but the widening makes these losses compile."""
    monkeypatch.setattr(
        _evaluate,
        "scan_types",
        lambda equation, inputs: (_evaluate.split_scan(equation, inputs)[1], None),
    )
    with pytest.raises(sk.errors.StepError, match="carry input and carry output differ"):
        assert_like_one_device(recurrent, sk.strategies.data(), {"data": 8})


def test_a_function_that_jax_makes_a_loop_of_is_right_or_refused():
    """JAX 0.10 and 0.11 lower `betainc` on shards to a loop whose constants have no type."""

    def loss(params, batch, key):
        weight = jax.scipy.special.betainc(2.0, 3.0, jax.nn.sigmoid(batch["x"]))
        return jnp.mean((batch["x"] @ params["w"]) * weight)

    try:
        step = sk.compile_step(
            loss,
            OPTIMIZER,
            init=init,
            batch=BATCH,
            mesh=sk.MeshSpec(data=2).build(devices=jax.devices()[:2]),
            strategy=sk.strategies.data(),
            mode="shard_map",
        )
    except sk.errors.StepError as refused:
        step, told = None, str(refused)
    if step is None:
        assert "beta" in told
        assert 'mode="auto"' in told
        return
    state = step.init(jax.random.key(0))
    want = jax.grad(loss)(jax.tree.map(jnp.asarray, state.params), BATCH, None)["w"]
    np.testing.assert_allclose(step.gradients(state, BATCH)[1]["w"], want, rtol=1e-5, atol=1e-6)
