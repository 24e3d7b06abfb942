"""`mode="shard_map"`: what its collectives are, losses of one's own, and what it refuses.

The parity of the decoder in this mode, and its bytes beside the textbook's, are rows of
`_parity.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.split_rng import GrownDim, RandomDraws, part_keys
from shardkit.testing import SHARD_MUTATIONS, kill_matrix

from . import _parity
from ._quick import some_quick

# Its first state holds the gradients that the step made.
OPTIMIZER = optax.chain(optax.trace(0.0), optax.clip_by_global_norm(0.5), optax.sgd(0.1))
RNG = np.random.default_rng(0)
LAYER = 4 * 16 * (4 * 16 + 3 * 24)  # bytes of the weights of one layer of the decoder

data, fsdp, tensor = (getattr(sk.strategies, name) for name in ("data", "fsdp", "tensor"))


def mesh_of(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


def assert_close(found, wanted):
    flat = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in flat:
        error = np.abs(np.asarray(a) - b).max() / (np.abs(b).max() or 1)
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)


def rows(name, axis, kind):
    """Collectives of arrays in a row of the parity table, without those of a few scalars."""
    ledger = _parity.compile_case(name).report().ledger
    return [row for row in ledger.where(axis, kind) if row.payload_bytes > 64]


@pytest.mark.slow
def test_gradients_of_data_parallelism_travel_in_one_buffer():
    (row,) = rows("shard_map data", "data", "all-reduce")
    assert row.trips == 1
    assert len([x for x in row.operands if x != "f32[4]"]) == 1


def test_fsdp_scatters_each_layer_once_and_gathers_it_again_for_its_backward_pass():
    scattered = [r for r in rows("shard_map fsdp", "fsdp", "reduce-scatter") if r.trips == 2]
    gathered = [r for r in rows("shard_map fsdp", "fsdp", "all-gather") if r.trips == 2]
    assert sum(r.payload_bytes for r in scattered) == LAYER
    assert sum(r.payload_bytes for r in gathered) == 2 * LAYER


@pytest.mark.slow
def test_kept_weights_are_gathered_once_whatever_the_remat_policy():
    gathered = [r for r in rows("shard_map fsdp kept", "fsdp", "all-gather") if r.trips == 2]
    assert sum(r.payload_bytes for r in gathered) == LAYER


@pytest.mark.slow
def test_the_head_and_the_stream_are_never_gathered_whole():
    assert not rows("shard_map fsdp sequence ×2", "tensor", "all-to-all")
    hlo = _parity.compile_case("shard_map fsdp sequence ×2").hlo()
    assert f"f32[2,{_parity.LENGTH},{_parity.VOCAB // 2}]" in hlo
    assert f"f32[2,{_parity.LENGTH},{_parity.VOCAB}]" not in hlo


@pytest.mark.slow
def test_evaluation_is_that_of_one_device():
    step, batch = _parity.compile_case("shard_map fsdp"), _parity.INPUTS.batch(0)
    state = step.init(jax.random.key(0))
    loss_fn = _parity.build_model(()).loss_fn
    mean, metrics = jax.jit(loss_fn.evaluate)(jax.device_get(state.params), batch, None)
    accuracy = metrics["accuracy"]
    wanted = {"accuracy": accuracy.total / accuracy.weight, "loss": mean.total / mean.weight}
    assert_close(step.evaluate(state, batch), jax.device_get(wanted))


def test_both_modes_agree_in_noise_and_in_numbers():
    step, batch = marked(mesh_of({"data": 2, "tensor": 2})), marked_batches()[0]
    told = []
    for one in (step, step.replace(mode="auto")):
        told.append(jax.device_get(one.gradients(one.init(jax.random.key(1)), batch)))
    assert_close(*told)


def test_bf16_is_reduced_in_the_dtype_that_is_asked_for():
    step = small(
        loss=plain_loss, precision=sk.Precision(compute_dtype="bfloat16", reduce_dtype="float32")
    )
    (row,) = [r for r in step.report().ledger.where("data", "all-reduce") if r.payload_bytes > 64]
    assert row.dtype == "f32"
    state = step.init(jax.random.key(0))
    other = step.replace(precision="float32").gradients(state, SMALL)[1]
    found = step.gradients(state, SMALL)[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        assert 1e-4 < np.abs(a - b).max() / np.abs(b).max() < 3e-2


# A user's model: plain arrays without names, an ordinary loss, noise in it.
SMALL = {"x": RNG.standard_normal((16, 8)).astype(np.float32)}


def small_init(key):
    up, down = jax.random.split(key)
    return {"up": jax.random.normal(up, (8, 16)), "down": jax.random.normal(down, (16, 8))}


def small_loss(params, batch, key):
    x = batch["x"].astype(params["up"].dtype)
    h = jnp.tanh(x @ params["up"])
    h = h * jax.random.bernoulli(key, 0.8, h.shape)
    return jnp.mean((h @ params["down"] - x) ** 2), {"size": jnp.abs(h).mean()}


def small(strategy=None, mesh=None, loss=small_loss, **options):
    return sk.compile_step(
        loss,
        OPTIMIZER,
        init=small_init,
        batch=SMALL,
        mesh=mesh_of(mesh or {"data": 8}),
        strategy=strategy or data(),
        mode="shard_map",
        **options,
    )


SPLIT = sk.Strategy(
    params=sk.PathRules({"up": P(None, "tensor"), "down": P("tensor")}),
    batch=P("data"),
)


def sharded_loss(params, batch, key):
    h = jnp.tanh(jax.lax.pcast(batch["x"], "tensor", to="varying") @ params["up"])
    y = jax.lax.psum(h @ params["down"], "tensor")
    return jnp.mean((y - batch["x"]) ** 2)


def plain_loss(params, batch, key):
    x = batch["x"].astype(params["up"].dtype)
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - x) ** 2)


PER_SHARD = sk.ShardMapLoss(sharded_loss, plain_loss)


@pytest.mark.parametrize(
    ("strategy", "mesh", "loss"),
    [
        pytest.param(data(), {"data": 8}, small_loss, marks=pytest.mark.slow),
        pytest.param(fsdp(min_size=1), {"fsdp": 4}, small_loss, marks=pytest.mark.slow),
        (data() | fsdp(min_size=1), {"data": 2, "fsdp": 4}, small_loss),
        (SPLIT, {"data": 2, "tensor": 4}, PER_SHARD),
    ],
    ids=["data", "fsdp", "data|fsdp", "per shard"],
)
def test_a_loss_of_your_own_has_the_numbers_of_one_device(strategy, mesh, loss):
    step = small(strategy, mesh, loss)
    state = step.init(jax.random.key(0))
    key = jax.random.fold_in(state.key, 0)

    def value(params):
        out = loss(params, SMALL, key)
        return out[0] if isinstance(out, tuple) else out

    params = jax.device_get(state.params)
    wanted = jax.jit(jax.value_and_grad(value))(params)
    metrics, grads = step.gradients(state, SMALL)
    assert_close((metrics["loss"], grads), jax.device_get(wanted))


def test_a_reduction_of_ones_own_over_the_rows_is_taken_as_it_is():
    def loss(params, batch, key):
        return jax.lax.pmean(sharded_loss(params, batch, key), "data")

    step = small(SPLIT, {"data": 2, "tensor": 4}, sk.ShardMapLoss(loss, plain_loss))
    state = step.init(jax.random.key(0))
    wanted = jax.jit(jax.grad(plain_loss))(jax.device_get(state.params), SMALL, None)
    assert_close(step.gradients(state, SMALL)[1], jax.device_get(wanted))


def of_embed(params, name):
    return sk.nn.use_param(params[name], "embed", None)


# What else a loss does with weights that layers gather, or with others of the same axes.
BESIDE_MARKS = {
    "a sum over a marked weight": lambda p, x: (
        jnp.mean((jnp.tanh(x @ of_embed(p, "up")) @ of_embed(p, "down")) ** 2)
        + 0.1 * sum(jnp.sum(w**2) for w in p.values())
    ),
    "one that is not marked": lambda p, x: jnp.mean(
        (jnp.tanh(x @ of_embed(p, "up")) @ p["down"]) ** 2
    ),
    "one that is marked once of twice": lambda p, x: jnp.mean(
        (jnp.tanh(x @ of_embed(p, "up")) @ p["up"] @ of_embed(p, "down")) ** 2
    ),
    "one that is computed": lambda p, x: jnp.mean(
        (x @ sk.nn.use_param(p["up"] / jnp.linalg.norm(p["up"], axis=0), "embed", None)) ** 2
    ),
    "one that is computed of two": lambda p, x: jnp.mean(
        (x @ sk.nn.use_param(p["up"] * p["down"], "embed", None)) ** 2
    ),
    "one that is cut": lambda p, x: jnp.mean((x[:, :4] @ of_embed({"w": p["up"][2:6]}, "w")) ** 2),
    "one in a loop": lambda p, x: jnp.mean(
        jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ of_embed(p, "up")) @ p["down"], x) ** 2
    ),
}


@pytest.mark.parametrize(
    "loss", some_quick(BESIDE_MARKS, "a sum over a marked weight", "one that is not marked")
)
def test_what_else_a_loss_does_with_marked_weights_is_that_of_one_device(loss):
    def init(key):
        pair = zip(("up", "down"), jax.random.split(key), strict=True)
        return {n: sk.WithAxes(jax.random.normal(k, (8, 8)), ("embed", None)) for n, k in pair}

    step = sk.compile_step(
        lambda params, batch, key: BESIDE_MARKS[loss](params, batch["x"]),
        OPTIMIZER,
        init=init,
        batch=SMALL,
        mesh=mesh_of({"fsdp": 4}),
        strategy=fsdp(),
        mode="shard_map",
    )
    state = step.init(jax.random.key(0))
    wanted = jax.value_and_grad(BESIDE_MARKS[loss])(jax.device_get(state.params), SMALL["x"])
    metrics, grads = step.gradients(state, SMALL)
    assert_close((metrics["loss"], grads), jax.device_get(wanted))


def message_of(error, **options):
    with pytest.raises(error) as raised:
        small(**options)
    return str(raised.value)


def test_a_forgotten_psum_names_the_axis():
    def forgotten(params, batch, key):
        h = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((h @ params["down"] - batch["x"]) ** 2)

    loss = sk.ShardMapLoss(forgotten, plain_loss)
    text = message_of(sk.errors.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "output 'loss'  differs per 'tensor' shard: add psum/pmean over 'tensor'" in text
    assert "Fix: jax.lax.psum(x, 'tensor') or pmean before it is returned" in text


def test_a_misspelt_axis_of_a_collective_is_named():
    def misspelt(params, batch, key):
        return jax.lax.psum(sharded_loss(params, batch, key), "tensr")

    loss = sk.ShardMapLoss(misspelt, plain_loss)
    text = message_of(sk.errors.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "psum(..., 'tensr')  the mesh has data=2, tensor=4. Did you mean 'tensor'?" in text
    assert "Fix: one of 'data', 'tensor'" in text


def test_a_weight_that_is_not_summed_beside_a_total_that_is():
    def uneven(params, batch, key):
        total = jax.lax.psum(jnp.sum(sharded_loss(params, batch, key)), "data")
        return sk.Mean(total, jnp.sum(batch["x"] ** 2))

    loss = sk.ShardMapLoss(uneven, plain_loss)
    text = message_of(sk.errors.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "its weight differs per 'data' shard, its total does not: add psum over 'data'" in text


def test_an_ordinary_loss_cannot_have_its_weights_split_over_what_splits_no_rows():
    text = message_of(sk.errors.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4})
    assert 'mode="shard_map" does not support this step on mesh (data=2, tensor=4).' in text
    assert "params/down f32[16,8]" in text
    assert "params/up f32[8,16]" in text
    assert "dim 1 is split over 'tensor', which splits neither rows nor products" in text
    assert "Fix: sk.ShardMapLoss(local, reference)" in text


def test_a_model_that_marks_nothing_cannot_be_split_by_name():
    def init(key):
        return jax.tree.map(lambda x: sk.WithAxes(x, ("embed", "mlp")), small_init(key))

    def loss(params, batch, key):
        h = sk.nn.constrain(batch["x"] @ params["up"], "batch", "mlp")
        return jnp.mean(h**2) + jnp.mean(params["down"] ** 2)

    with pytest.raises(sk.errors.StepError) as raised:
        sk.compile_step(
            loss,
            OPTIMIZER,
            init=init,
            batch=SMALL,
            mesh=mesh_of({"data": 2, "tensor": 4}),
            strategy=data() | tensor(),
            mode="shard_map",
        )
    text = str(raised.value)
    assert "params/up f32[8,16]" in text
    assert "dim 1 ('mlp') is split over 'tensor', and the model never marks what goes into" in text
    assert "h = sk.nn.constrain(h, ..., into=('mlp',))" in text


def test_what_explicit_collectives_cannot_do_is_said_at_once():
    strategy = dataclasses.replace(
        data(), kinds=sk.strategies.context("data").kinds, batch=P("data", "tensor")
    )
    text = message_of(
        sk.errors.StepError, strategy=strategy, mesh={"data": 2, "tensor": 4}, loss=small_loss
    )
    assert "context parallelism  over mesh axis 'data' is left to the partitioner" in text
    assert "batch/x f32[16,8]" in text
    assert "is split over 'tensor' beyond its rows" in text
    assert 'mode="auto"' in text


def test_a_misspelt_mark_is_named():
    def loss(params, batch, key):
        x = sk.nn.constrain(batch["x"], "batch", "embed", into=("mlp",))
        y = jnp.tanh(x @ params["up"]) @ params["down"]
        return jnp.mean(sk.nn.constrain(y, "batch", "embed", partial=("mpl",)) ** 2)

    text = message_of(sk.errors.StepError, strategy=data(), loss=loss)
    assert "activations do not list logical axis 'mpl'. Did you mean 'mlp'?" in text


def test_keys_that_are_split_otherwise_than_queries():
    strategy = (data() | tensor()).with_names(
        params={"kv_heads": None}, activations={"kv_heads": None}
    )
    made = _parity.build_model(())
    with pytest.raises(sk.errors.StepError) as raised:
        sk.compile_step(
            made.loss_fn,
            OPTIMIZER,
            init=made.init,
            batch=_parity.INPUTS.batch(0),
            mesh=mesh_of({"data": 2, "tensor": 4}),
            strategy=strategy,
            mode="shard_map",
        )
    text = str(raised.value)
    assert "heads are split over 'tensor', kv_heads over nothing" in text
    assert 'mode="auto" for fewer groups than devices; or ' in text
    assert 'strategies.tensor(kv_heads="split") on an axis whose size divides kv_heads' in text


def test_a_mode_that_is_not_there():
    with pytest.raises(sk.errors.StepError, match="Did you mean 'shard_map'"):
        small().replace(mode="shardmap")


# The same with a loss that names its dims, for what verifies and mutates steps.
def marked_init(key):
    up, down = jax.random.split(key)
    return {
        "up": sk.WithAxes(jax.random.normal(up, (4, 8)), ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(down, (8, 4)), ("mlp", "embed")),
        "scale": sk.WithAxes(jnp.ones(4), ("norm",)),
    }


def marked_loss(params, batch, key):
    x = sk.nn.constrain(batch["x"] * params["scale"], "batch", "embed", into=("mlp",))
    h = sk.nn.constrain(
        jax.nn.relu(x @ sk.nn.use_param(params["up"], "embed", "mlp")), "batch", "mlp"
    )
    y = h @ sk.nn.use_param(params["down"], "mlp", "embed")
    y = sk.nn.constrain(y, "batch", "embed", partial=("mlp",))
    y = jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y, 0)
    weight = batch["w"].sum()
    total = jnp.sum(batch["w"] * jnp.mean((y - batch["x"]) ** 2, axis=-1))
    return sk.Mean(total, weight), {"size": sk.Mean(jnp.sum(batch["w"] * y.mean(-1)), weight)}


def marked_batches():
    w = np.array([0, 0, 0, 0, 1, 1, 0, 1], np.float32)
    return [{"x": RNG.standard_normal((8, 4)).astype(np.float32), "w": w} for _ in range(2)]


def marked(mesh):
    return sk.compile_step(
        marked_loss,
        optax.adamw(1e-2),
        init=marked_init,
        batch=marked_batches()[0],
        mesh=mesh,
        strategy=data() | tensor(),
        mode="shard_map",
    )


@pytest.mark.slow
def test_every_mutation_of_shards_is_killed():
    matrix = kill_matrix(
        marked,
        mesh_of({"data": 2, "tensor": 2}),
        batches=marked_batches(),
        steps=2,
        mutations=SHARD_MUTATIONS,
    )
    matrix.check()
    assert [row.mutation for row in matrix.rows] == list(SHARD_MUTATIONS)


@pytest.mark.slow
def test_a_certificate_on_an_asymmetric_mesh():
    sk.verify(marked, [sk.MeshSpec(data=2, tensor=4)], batches=marked_batches()).check()


def compressed(**options):
    return small(
        dataclasses.replace(data(), compression=sk.GradientCompression("data", block=32)), **options
    )


def test_compressed_gradients_travel_as_bytes_and_what_is_left_out_is_kept():
    step, exact = compressed(loss=plain_loss), small(loss=plain_loss)
    sizes = {r.dtype: r.payload_bytes for r in step.report().ledger.where("data", "all-to-all")}
    assert sizes["s8"] == 256
    assert sizes["f32"] == 256 // 32 * 4
    assert not [r for r in step.report().ledger.where("data", "all-reduce") if r.payload_bytes > 64]
    state = step.init(jax.random.key(0))
    left = state.model_state["compression"]["up"]
    assert left.shape == (8, 8, 16)
    assert left.sharding.spec[0] == "data"
    wanted = jax.tree.leaves(exact.gradients(dataclasses.replace(state, model_state={}), SMALL)[1])
    state, _ = step(state, SMALL)
    found = jax.tree.leaves(state.opt_state[0].trace)
    kept = jax.tree.leaves(state.model_state["compression"])
    for got, want, rest in zip(found, wanted, kept, strict=True):
        assert 1e-4 < np.abs(got - want).max() / np.abs(want).max() < 2e-2
        # Nothing is lost: what arrived and what was left out are what was to be sent.
        np.testing.assert_allclose(got + rest.sum(0), want, atol=1e-6)


def test_gradients_scattered_over_one_axis_are_compressed_over_a_slow_one():
    strategy = dataclasses.replace(
        data() | fsdp(min_size=1), compression=sk.GradientCompression("data", block=8)
    )
    step = small(strategy, {"data": 2, "fsdp": 4}, plain_loss)
    sent = step.report().ledger
    assert {r.dtype for r in sent.where("data", "all-to-all")} == {"s8", "f32"}
    assert {r.dtype for r in sent.where("fsdp", "reduce-scatter")} == {"f32"}
    assert not [r for r in sent.where("data", "all-reduce") if r.payload_bytes > 64]
    exact = dataclasses.replace(strategy, compression=None)
    state = step.init(jax.random.key(0))
    wanted = small(exact, {"data": 2, "fsdp": 4}, plain_loss).gradients(
        dataclasses.replace(state, model_state={}), SMALL
    )[1]
    state, _ = step(state, SMALL)
    for got, want in zip(
        jax.tree.leaves(state.opt_state[0].trace), jax.tree.leaves(wanted), strict=True
    ):
        assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 2e-2


def test_compression_is_refused_where_it_cannot_be():
    with pytest.raises(sk.errors.StepError) as raised:
        compressed().replace(mode="auto")
    assert "sums gradients over 'data' itself; here the partitioner sums them" in str(raised.value)
    text = message_of(
        sk.errors.StepError,
        strategy=dataclasses.replace(data(), compression=sk.GradientCompression("dat")),
    )
    assert "mesh axis 'dat' is not in the mesh. Did you mean 'data'?" in text
    strategy = dataclasses.replace(fsdp(min_size=1), compression=sk.GradientCompression("fsdp"))
    text = message_of(sk.errors.StepError, strategy=strategy, mesh={"fsdp": 8})
    assert "gradients are not summed over 'fsdp', they are scattered over it or equal" in text
    with pytest.raises(sk.errors.StepError, match="'int4' is not 'int8'"):
        sk.GradientCompression("data", dtype="int4")


def test_a_slice_of_the_length_draws_its_part():
    drawn = "bits", (2, 3, 3)
    rows, length = (((drawn, GrownDim((2, 3, 3), dim)),) for dim in (0, 1))
    draws = RandomDraws(2, rows, length_shards=2, length_dims=length)
    key, whole = jax.random.key(3), jax.random.bits(jax.random.key(3), (4, 6, 3))
    for shard, cut in np.ndindex(2, 2):
        own = part_keys(jax.random.key_data(key), draws, shard, 0, cut)
        found = jax.random.bits(own, (2, 3, 3))
        wanted = whole[2 * shard : 2 * shard + 2, 3 * cut : 3 * cut + 3]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_the_decoder_has_its_certificate_in_this_mode():
    model = _parity.build_model(())

    def factory(mesh):
        return sk.compile_step(
            model.loss_fn,
            optax.adamw(1e-2),
            init=model.init,
            batch=_parity.INPUTS.batches[0],
            mesh=mesh,
            strategy=fsdp() | tensor(sequence=True),
            mode="shard_map",
        )

    mesh = sk.MeshSpec(fsdp=2, tensor=2)
    found = sk.verify(factory, [mesh], batches=_parity.INPUTS.batches, steps=2).check()
    assert len(found.rows) == 15
