"""`mode="shard_map"`: explicit collectives give the numbers of one device, at the least bytes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._lanes import Draws, part_keys
from shardkit.models import Decoder, DecoderConfig, decoder_loss
from shardkit.testing import kill_matrix
from shardkit.testing.mutations import SHARD_MUTATIONS

# So many layers that the embedding and the head, which the minima leave out, do not show.
CONFIG = DecoderConfig(
    vocab=32, embed=16, layers=16, heads=4, mlp=24, kv_heads=4, dropout=0.1, z_loss=1e-3
)
TIED = dataclasses.replace(CONFIG, layers=2, tied=True, loss_chunks=2, bias=True)
ROWS, LENGTH, LIMIT = 16, 16, 0.5
RNG = np.random.default_rng(0)
BATCH = {
    "inputs": RNG.integers(0, 32, (ROWS, LENGTH)).astype(np.int32),
    "targets": RNG.integers(0, 32, (ROWS, LENGTH)).astype(np.int32),
    # The first five rows have no valid token at all.
    "weights": (np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) > 80).astype(np.float32),
}
# Its first state holds the gradients that the step made.
OPTIMIZER = optax.chain(optax.trace(0.0), optax.clip_by_global_norm(LIMIT), optax.sgd(0.1))

data, fsdp, tensor, zero = (
    getattr(sk.strategies, name) for name in ("data", "fsdp", "tensor", "zero")
)
sequence = functools.partial(tensor, sequence=True)


ONCE = sk.Accumulate()


@dataclasses.dataclass(frozen=True)
class Case:
    strategy: sk.Strategy
    mesh: dict
    config: DecoderConfig = CONFIG
    accumulate: sk.Accumulate = ONCE
    remat: str = "none"
    slow: bool = True


CASES = {
    "data": Case(data(), {"data": 8}, slow=False),
    "fsdp": Case(fsdp(), {"fsdp": 8}),
    "data|tensor": Case(data() | tensor(), {"data": 2, "tensor": 4}),
    "data|sequence": Case(data() | sequence(), {"data": 2, "tensor": 4}),
    "fsdp|sequence": Case(fsdp() | sequence(), {"fsdp": 4, "tensor": 2}, slow=False),
    "data|fsdp|tensor": Case(
        data() | fsdp(reshard_after_forward=False) | tensor(),
        {"data": 2, "fsdp": 2, "tensor": 2},
        remat="full",
    ),
    "zero|sequence": Case(zero() | sequence(), {"data": 4, "tensor": 2}),
    "fsdp|tensor, once for 2": Case(
        fsdp() | tensor(), {"fsdp": 4, "tensor": 2}, accumulate=sk.Accumulate(2)
    ),
    "tied, each of 2": Case(
        fsdp() | sequence(), {"fsdp": 2, "tensor": 4}, TIED, sk.Accumulate(2, "each"), "full"
    ),
}
NAMES = [
    name if not case.slow else pytest.param(name, marks=pytest.mark.slow)
    for name, case in CASES.items()
]


def model(config):
    return sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def mesh_of(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


@functools.cache
def compiled(name):
    case = CASES[name]
    made = model(case.config)
    return sk.compile_step(
        made.loss_fn,
        OPTIMIZER,
        init=made.init,
        batch=BATCH,
        mesh=mesh_of(case.mesh),
        strategy=case.strategy,
        accumulate=case.accumulate,
        remat=case.remat,
        mode="shard_map",
    )


@functools.cache
def first(config):
    """Parameters and key of the first state, without a mesh or a step."""
    for_init, for_steps = jax.random.split(jax.random.key(0))
    boxed = jax.jit(model(config).init)(for_init)
    return jax.device_get(jax.tree.map(lambda x: x.value, boxed, is_leaf=named)), for_steps


def named(x):
    return isinstance(x, sk.Named)


@functools.cache
def one_device(config, parts):
    """Loss, gradients and clipped update of plain JAX, micro-batch by micro-batch."""
    params, key = first(config)
    key, loss_fn = jax.random.fold_in(key, 0), model(config).loss_fn

    def part(params, rows, key):
        (mean, _) = loss_fn(params, rows, key)
        return mean.total, mean.weight

    run = jax.jit(jax.value_and_grad(part, has_aux=True))
    found = [
        run(
            params,
            {k: x[i::parts] for k, x in BATCH.items()},
            jax.random.fold_in(key, i) if parts > 1 else key,
        )
        for i in range(parts)
    ]
    total, weight = (sum(float(v[i]) for v, _ in found) for i in range(2))
    grads = jax.tree.map(
        lambda *g: np.sum([np.asarray(x) for x in g], 0) / weight, *[g for _, g in found]
    )
    norm = float(optax.tree.norm(grads))
    after = jax.tree.map(lambda p, g: p - 0.1 * g * min(1, LIMIT / norm), params, grads)
    return {"loss": total / weight, "grad_norm": norm}, grads, after


def assert_close(found, wanted):
    flat = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in flat:
        error = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_one_device(name):
    case, step = CASES[name], compiled(name)
    state = step.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, first(case.config)[0])
    metrics, grads, after = one_device(case.config, case.accumulate.steps)
    assert metrics["grad_norm"] > LIMIT  # the clip is active
    new, told = step(state, BATCH)
    assert_close({name: told[name] for name in metrics}, metrics)
    assert_close(new.opt_state[0].trace, grads)
    assert_close(new.params, after)


RATIOS = {
    "data": {"data": 1.0},
    "fsdp": {"fsdp": 1.0},
    "data|tensor": {"data": 1.0, "tensor": 1.05},
    "data|sequence": {"data": 1.0, "tensor": 1.05},
    "fsdp|sequence": {"fsdp": 1.0, "tensor": 1.05},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if CASES[n].slow else n for n in RATIOS]
)
def test_bytes_are_the_textbook_minimum(name):
    report = compiled(name).report()
    found = {least.axis: least.ratio for least in report.minima}
    assert found.keys() == RATIOS[name].keys()
    for axis, most in RATIOS[name].items():
        assert found[axis] <= max(most, 1.01), (name, found)


def rows(name, axis, kind):
    """Collectives of arrays, without those of a few scalars."""
    ledger = compiled(name).report().ledger
    return [row for row in ledger.where(axis, kind) if row.payload_bytes > 64]


def test_gradients_of_data_parallelism_travel_in_one_buffer():
    (row,) = rows("data", "data", "all-reduce")
    assert row.trips == 1
    assert len([x for x in row.operands if x != "f32[4]"]) == 1


def test_fsdp_scatters_each_layer_once_and_gathers_it_again_for_its_backward_pass():
    scattered = [r for r in rows("fsdp|sequence", "fsdp", "reduce-scatter") if r.trips == 16]
    gathered = [r for r in rows("fsdp|sequence", "fsdp", "all-gather") if r.trips == 16]
    per_layer = 4 * 16 * (4 * 16 + 3 * 24) // 2  # bytes of a layer's shard over tensor
    assert sum(r.payload_bytes for r in scattered) == per_layer
    assert sum(r.payload_bytes for r in gathered) == 2 * per_layer


@pytest.mark.slow
def test_kept_weights_are_gathered_once_whatever_the_remat_policy():
    gathered = [r for r in rows("data|fsdp|tensor", "fsdp", "all-gather") if r.trips == 16]
    per_layer = 4 * 16 * (4 * 16 + 3 * 24) // 2
    assert sum(r.payload_bytes for r in gathered) == per_layer


def test_the_head_and_the_stream_are_never_gathered_whole():
    assert not rows("fsdp|sequence", "tensor", "all-to-all")
    assert f"f32[4,{LENGTH},32]" not in compiled("fsdp|sequence").hlo()


def test_evaluation_is_that_of_one_device():
    step = compiled("fsdp|sequence")
    state = step.init(jax.random.key(0))
    params, _ = first(CONFIG)
    mean, metrics = jax.jit(model(CONFIG).loss_fn.evaluate)(params, BATCH, None)
    accuracy = metrics["accuracy"]
    wanted = {"accuracy": accuracy.total / accuracy.weight, "loss": mean.total / mean.weight}
    assert_close(step.evaluate(state, BATCH), jax.device_get(wanted))


@pytest.mark.slow
def test_both_modes_agree_in_noise_and_in_numbers():
    step = compiled("data|sequence")
    told = []
    for one in (step, step.replace(mode="auto")):
        state, metrics = one(one.init(jax.random.key(1)), BATCH)
        told.append(jax.device_get((metrics, state.opt_state[0].trace)))
    assert_close(*told)


def test_bf16_is_reduced_in_the_dtype_that_is_asked_for():
    step = small(loss=plain_loss, precision=sk.Precision(compute="bfloat16", reduce="float32"))
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


PER_SHARD = sk.PerShard(sharded_loss, plain_loss)


@pytest.mark.parametrize(
    ("strategy", "mesh", "loss"),
    [
        (data(), {"data": 8}, small_loss),
        (fsdp(min_size=1), {"fsdp": 4}, small_loss),
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

    step = small(SPLIT, {"data": 2, "tensor": 4}, sk.PerShard(loss, plain_loss))
    state = step.init(jax.random.key(0))
    wanted = jax.jit(jax.grad(plain_loss))(jax.device_get(state.params), SMALL, None)
    assert_close(step.gradients(state, SMALL)[1], jax.device_get(wanted))


def message_of(error, **options):
    with pytest.raises(error) as raised:
        small(**options)
    return str(raised.value)


def test_a_forgotten_psum_names_the_axis():
    def forgotten(params, batch, key):
        h = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((h @ params["down"] - batch["x"]) ** 2)

    loss = sk.PerShard(forgotten, plain_loss)
    text = message_of(sk.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "output 'loss'  differs per 'tensor' shard: add psum/pmean over 'tensor'" in text
    assert "Fix: jax.lax.psum(x, 'tensor') or pmean before it is returned" in text


def test_a_misspelt_axis_of_a_collective_is_named():
    def misspelt(params, batch, key):
        return jax.lax.psum(sharded_loss(params, batch, key), "tensr")

    loss = sk.PerShard(misspelt, plain_loss)
    text = message_of(sk.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "psum(..., 'tensr')  the mesh has data=2, tensor=4. Did you mean 'tensor'?" in text
    assert "Fix: one of 'data', 'tensor'" in text


def test_a_weight_that_is_not_summed_beside_a_total_that_is():
    def uneven(params, batch, key):
        total = jax.lax.psum(jnp.sum(sharded_loss(params, batch, key)), "data")
        return sk.Mean(total, jnp.sum(batch["x"] ** 2))

    loss = sk.PerShard(uneven, plain_loss)
    text = message_of(sk.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4}, loss=loss)
    assert "its weight differs per 'data' shard, its total does not: add psum over 'data'" in text


def test_an_ordinary_loss_cannot_have_its_weights_split_over_what_splits_no_rows():
    text = message_of(sk.StepError, strategy=SPLIT, mesh={"data": 2, "tensor": 4})
    assert 'mode="shard_map" cannot carry this out on mesh (data=2, tensor=4).' in text
    assert "params/down f32[16,8]" in text
    assert "params/up f32[8,16]" in text
    assert "dim 1 is split over 'tensor', which splits neither rows nor products" in text
    assert "Fix: sk.PerShard(loss, plain)" in text


def test_a_model_that_marks_nothing_cannot_be_split_by_name():
    def init(key):
        return jax.tree.map(lambda x: sk.Named(x, ("embed", "mlp")), small_init(key))

    def loss(params, batch, key):
        h = sk.constrain(batch["x"] @ params["up"], "batch", "mlp")
        return jnp.mean(h**2) + jnp.mean(params["down"] ** 2)

    with pytest.raises(sk.StepError) as raised:
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
    assert "h = sk.constrain(h, ..., into=('mlp',))" in text


def test_what_explicit_collectives_cannot_do_is_said_at_once():
    strategy = dataclasses.replace(data(), kinds=(("context", "data"),), batch=P("data", "tensor"))
    stateful = sk.Loss(small_loss, small_loss, stateful=True)
    text = message_of(sk.StepError, strategy=strategy, mesh={"data": 2, "tensor": 4}, loss=stateful)
    assert "loss_fn" in text
    assert "carries mutable state, which would be that of one device's rows" in text
    assert "context parallelism  over mesh axis 'data' is left to the partitioner" in text
    assert "batch/x f32[16,8]" in text
    assert "is split over 'tensor' beyond its rows" in text
    assert 'mode="auto"' in text


def test_a_misspelt_mark_is_named():
    def loss(params, batch, key):
        x = sk.constrain(batch["x"], "batch", "embed", into=("mlp",))
        y = jnp.tanh(x @ params["up"]) @ params["down"]
        return jnp.mean(sk.constrain(y, "batch", "embed", partial=("mpl",)) ** 2)

    text = message_of(sk.StepError, strategy=data(), loss=loss)
    assert "activations do not list logical axis 'mpl'. Did you mean 'mlp'?" in text


def test_keys_that_are_split_otherwise_than_queries():
    strategy = (data() | tensor()).with_names(
        params={"kv_heads": None}, activations={"kv_heads": None}
    )
    made = model(TIED)
    with pytest.raises(sk.StepError, match="heads are split over 'tensor', kv_heads over nothing"):
        sk.compile_step(
            made.loss_fn,
            OPTIMIZER,
            init=made.init,
            batch=BATCH,
            mesh=mesh_of({"data": 2, "tensor": 4}),
            strategy=strategy,
            mode="shard_map",
        )


def test_a_mode_that_is_not_there():
    with pytest.raises(sk.StepError, match="Did you mean 'shard_map'"):
        small().replace(mode="shardmap")


# The same with a loss that names its dims, for what verifies and mutates steps.
def marked_init(key):
    up, down = jax.random.split(key)
    return {
        "up": sk.Named(jax.random.normal(up, (4, 8)), ("embed", "mlp")),
        "down": sk.Named(jax.random.normal(down, (8, 4)), ("mlp", "embed")),
        "scale": sk.Named(jnp.ones(4), ("norm",)),
    }


def marked_loss(params, batch, key):
    x = sk.constrain(batch["x"] * params["scale"], "batch", "embed", into=("mlp",))
    h = sk.constrain(jax.nn.relu(x @ sk.weight(params["up"], "embed", "mlp")), "batch", "mlp")
    y = h @ sk.weight(params["down"], "mlp", "embed")
    y = sk.constrain(y, "batch", "embed", partial=("mlp",))
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
        dataclasses.replace(data(), compression=sk.Compression("data", block=32)), **options
    )


def test_compressed_gradients_travel_as_bytes_and_what_is_left_out_is_kept():
    step, exact = compressed(loss=plain_loss), small(loss=plain_loss)
    sizes = {r.dtype: r.payload_bytes for r in step.report().ledger.where("data", "all-to-all")}
    assert sizes["s8"] == 256
    assert sizes["f32"] == 256 // 32 * 4
    assert not [r for r in step.report().ledger.where("data", "all-reduce") if r.payload_bytes > 64]
    state = step.init(jax.random.key(0))
    left = state.extra["compression"]["up"]
    assert left.shape == (8, 8, 16)
    assert left.sharding.spec[0] == "data"
    wanted = jax.tree.leaves(exact.gradients(dataclasses.replace(state, extra={}), SMALL)[1])
    state, _ = step(state, SMALL)
    found = jax.tree.leaves(state.opt_state[0].trace)
    kept = jax.tree.leaves(state.extra["compression"])
    for got, want, rest in zip(found, wanted, kept, strict=True):
        assert 1e-4 < np.abs(got - want).max() / np.abs(want).max() < 2e-2
        # Nothing is lost: what arrived and what was left out are what was to be sent.
        np.testing.assert_allclose(got + rest.sum(0), want, atol=1e-6)


def test_compression_is_refused_where_it_cannot_be():
    with pytest.raises(sk.StepError) as raised:
        compressed().replace(mode="auto")
    assert "sums gradients over 'data' itself, which the partitioner does here" in str(raised.value)
    text = message_of(
        sk.StepError,
        strategy=dataclasses.replace(data(), compression=sk.Compression("dat")),
    )
    assert "mesh axis 'dat' is not in the mesh. Did you mean 'data'?" in text
    strategy = dataclasses.replace(fsdp(min_size=1), compression=sk.Compression("fsdp"))
    text = message_of(sk.StepError, strategy=strategy, mesh={"fsdp": 8})
    assert "gradients are not summed over 'fsdp', they are scattered over it or equal" in text
    with pytest.raises(sk.StepError, match="'int4' is not 'int8'"):
        sk.Compression("data", dtype="int4")


def test_a_slice_of_the_length_draws_its_part():
    draws = Draws(2, ((("bits", (2, 3, 3)), 0),), slices=2, sliced=((("bits", (2, 3, 3)), 1),))
    key, whole = jax.random.key(3), jax.random.bits(jax.random.key(3), (4, 6, 3))
    for lane, cut in np.ndindex(2, 2):
        own = part_keys(jax.random.key_data(key), draws, lane, 0, cut)
        found = jax.random.bits(own, (2, 3, 3))
        wanted = whole[2 * lane : 2 * lane + 2, 3 * cut : 3 * cut + 3]
        np.testing.assert_array_equal(found, wanted)
