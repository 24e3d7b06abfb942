"""Pipelines against one device: every schedule, every gradient, and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.parallel import schedule
from shardkit.parallel.pipeline import _executor
from shardkit.parallel.pipeline._tick_program import tick_program
from shardkit.testing import PIPELINE_MUTATIONS, kill_matrix

from . import _staged as model

pipeline = sk.strategies.pipeline
ROWS = 16
DATA, FSDP, TENSOR = sk.strategies.data(), sk.strategies.fsdp(), sk.strategies.tensor()


def built(**sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: int(np.prod(list(sizes.values())))])


STEPS, RATE = 2, 0.25


# Model FLOPs of a layer and of the head: three products for each one forward.
TOKENS, WIDTH = ROWS * model.LENGTH, model.WIDTH
LAYER, HEAD = 3 * 2 * TOKENS * WIDTH * 4 * WIDTH, 3 * 2 * TOKENS * WIDTH * model.VOCAB


def on_host(state):
    return jax.tree.map(np.array, dataclasses.replace(state, key=jax.random.key_data(state.key)))


def placed(start, step):
    """A state of its own for a step, which will consume it."""
    mine = jax.tree.map(np.array, start)
    typed = dataclasses.replace(mine, key=jax.random.wrap_key_data(mine.key))
    return jax.device_put(typed, step.layout.shardings)


def trained(step, start, batch=None):
    """Metrics of each step and the parameters after the first and the last, on the host."""
    state, seen, batch = placed(start, step), [], batch or model.make_batch(ROWS)
    for number in range(STEPS):
        state, metrics = step(state, batch)
        seen.append(jax.device_get(metrics))
        if number == 0:
            after_one = jax.device_get(state.params)
    return seen, after_one, jax.device_get(state.params)


@functools.cache
def one_device(layers):
    axes = dict.fromkeys(("data", "pipe", "tensor", "fsdp"), 1)
    step = model.step(built(**axes), DATA, layers, ROWS, optimizer=optax.sgd(RATE))
    start = on_host(step.init(jax.random.key(3)))
    return start, trained(step, start)


def assert_equal_to_one_device(step, layers):
    start, (seen, after_one, after_all) = one_device(layers)
    got_seen, got_one, got_all = trained(step, start)
    assert_close(got_seen[0], seen[0])
    assert_close(*(jax.tree.map(np.subtract, p, start.params) for p in (got_one, after_one)))
    assert_close((got_seen, got_all), (seen, after_all))


def assert_close(got, want):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=str(path))


INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
CASES = {
    "1f1b": (4, pipeline(micro_batches=8), {"pipe": 4}),
    "gpipe": (4, pipeline(schedule="gpipe", micro_batches=4), {"pipe": 2}),
    "interleaved": (8, pipeline(**INTERLEAVED, micro_batches=4), {"pipe": 4}),
    "zero bubble": (4, pipeline(schedule="zero_bubble", micro_batches=8), {"pipe": 4}),
    "eight stages": (8, pipeline(micro_batches=4), {"pipe": 8}),
    "uneven": (8, pipeline(micro_batches=2, layers_per_stage=(3, 2, 2, 1)), {"pipe": 4}),
    "stored whole": (
        5,
        pipeline(micro_batches=2, layers_per_stage=(3, 2)).with_names(params={"layers": None}),
        {"pipe": 2},
    ),
    "data, tensor": (
        4,
        DATA | pipeline(micro_batches=4) | TENSOR,
        {"data": 2, "pipe": 2, "tensor": 2},
    ),
    "fsdp": (4, FSDP | pipeline(micro_batches=2, outer_params="split"), {"fsdp": 4, "pipe": 2}),
    "zero bubble, fsdp, tensor": (
        4,
        FSDP | pipeline(schedule="zero_bubble", micro_batches=4) | TENSOR,
        {"fsdp": 2, "pipe": 2, "tensor": 2},
    ),
}


@pytest.fixture
def polluted(monkeypatch):
    """Messages that no stage needs are NaN, and so are slots before they are written."""
    zero_message, empty_slots = _executor.zero_message, _executor.empty_slots

    def nans(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)

    monkeypatch.setattr(_executor, "zero_message", lambda like: nans(zero_message(like)))
    monkeypatch.setattr(_executor, "empty_slots", lambda like, n: nans(empty_slots(like, n)))


@pytest.mark.slow
@pytest.mark.usefixtures("polluted")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_device_and_bubbles_leak_nothing(name):
    layers, strategy, sizes = CASES[name]
    step = model.step(built(**sizes), strategy, layers, ROWS, optimizer=optax.sgd(RATE))
    assert_equal_to_one_device(step, layers)
    flops = step.report().flops
    if "zero bubble" not in name:  # whose weight halves compute gradients of inputs again
        assert flops.model == LAYER * layers + HEAD
    assert flops.recompute > 0


@pytest.mark.usefixtures("polluted")
def test_evaluations_are_those_of_one_device():
    start, _ = one_device(4)
    step = model.step(built(data=2, pipe=4), DATA | pipeline(micro_batches=4), 4, ROWS)
    state, batch = placed(start, step), model.make_batch(ROWS)
    quiet = model.step(built(data=1), DATA, 4, ROWS, loss=sk.Loss(model.loss, model.loss))
    want = quiet.evaluate(placed(start, quiet), batch)
    assert_close(jax.device_get(step.evaluate(state, batch)), jax.device_get(want))
    # State is split over the stages: a quarter of the layers each.
    assert step.report().memory.params < 0.4 * quiet.report().memory.params


def test_a_scalar_loss_is_the_mean_over_equal_parts():
    def last(ends, x, batch):
        return (x**2).mean(), {"largest": jnp.abs(x).mean()}

    loss = functools.partial(model.loss, last=last)
    start, _ = one_device(4)
    steps = [
        model.step(built(**sizes), strategy, 4, ROWS, loss=loss, optimizer=optax.sgd(RATE))
        for sizes, strategy in (
            ({"data": 1}, DATA),
            ({"data": 2, "pipe": 2}, DATA | pipeline(micro_batches=4)),
        )
    ]
    assert_close(*(trained(step, start) for step in steps))


def wide(params, batch, key):
    """Activations of 32 KiB a micro-batch of 4 rows, from a batch of a few bytes."""
    return sk.nn.layer_stack(
        lambda ends, batch, key: batch["x"][:, None, None] * ends,
        lambda w, x, batch, key: x + jnp.tanh(x @ w),
        lambda ends, x, batch: (x**2).mean(),
        params["start"],
        params["w"],
        batch,
    )


def temporary(name, micro_batches):
    """Bytes of temporaries of a compiled step whose micro-batches have 4 rows each."""
    step = sk.compile_step(
        wide,
        optax.sgd(0.1),
        init=lambda key: {
            "start": sk.WithAxes(jnp.ones((64, 32)), ("length", "embed")),
            "w": sk.WithAxes(jnp.ones((4, 32, 32)), ("layers", "embed", "mlp")),
        },
        batch={"x": np.ones(4 * micro_batches, np.float32)},
        mesh=built(pipe=4),
        strategy=pipeline(schedule=name, micro_batches=micro_batches).with_names(
            params={"length": None}
        ),
    )
    return step.report().memory.temp


@pytest.mark.slow
def test_memory_of_1f1b_is_bounded_by_stages_and_that_of_gpipe_is_not():
    activation = 4 * 64 * 32 * 4
    grown = {
        name: temporary(name, 24) - temporary(name, 8) for name in ("1f1b", "gpipe", "zero_bubble")
    }
    assert abs(grown["1f1b"]) < activation
    assert abs(grown["zero_bubble"]) < activation
    assert grown["gpipe"] >= 16 * activation


def ledger(strategy, sizes, rows=ROWS, layers=4):
    report = model.step(built(**sizes), strategy, layers, rows).report()
    return report, [row for row in report.ledger if row.kind == "collective-permute"]


def test_each_boundary_carries_one_activation_per_micro_batch_each_way():
    m = 8
    report, sent = ledger(DATA | pipeline(micro_batches=m), {"data": 2, "pipe": 4})
    table = schedule("1f1b", stages=4, micro_batches=m)
    activation = ROWS // 2 // m * model.LENGTH * model.WIDTH * 4
    # Two exchanges, one of even and one of odd ticks; each tick but the last one takes one.
    assert [row.payload_bytes for row in sent] == [activation] * 2
    assert {row.trips for row in sent} == {len(table.ticks)}
    # Over the even boundaries all stages send, over the odd one the first and the last do not.
    assert [row.wire_bytes for row in sent] == [11 * activation, 10 * activation // 2]
    # Forward passes of all parts but the last, and each once more in its backward pass.
    layers = 4 * ROWS * model.LENGTH * 2 * (2 * model.WIDTH * 2 * model.WIDTH)
    head = ROWS * model.LENGTH * 2 * model.WIDTH * model.VOCAB
    assert report.flops.total == 3.75 * layers + 3 * head
    # What the table has them send: each of 3 boundaries m times each way, and in the bubble.
    needed = 2 * m * 3
    assert needed <= tick_program(table).messages() <= needed * len(table.ticks) / (2 * m)
    # Rows are split over `data`, whose gradients are reduced once, after the last tick.
    reduced = [row for row in report.ledger if "data" in row.axes and row.payload_bytes > 64]
    assert {row.trips for row in reduced} == {1}


def test_weights_split_over_fsdp_are_gathered_once_per_step():
    strategy = FSDP | pipeline(micro_batches=4)
    report, _ = ledger(strategy, {"fsdp": 2, "pipe": 2})
    gathers = [row for row in report.ledger if row.kind == "all-gather"]
    assert gathers
    assert {row.trips for row in gathers} == {1}
    stage = 2 * model.WIDTH * 2 * model.WIDTH * 4 * 2  # two layers of up and down, f32
    table = model.VOCAB * model.WIDTH * 4
    assert sum(row.wire_bytes for row in gathers) == (stage + table) / 2


@pytest.mark.slow
def test_segments_over_a_split_length_tied_ends_and_dropout_are_those_of_one_device():
    decoder = DecoderConfig(
        vocab=32,
        embed_dim=16,
        num_layers=4,
        num_heads=2,
        mlp_dim=24,
        tie_embeddings=True,
        dropout=0.1,
    )
    adapted = sk.from_nnx(lambda rngs: Decoder(decoder, rngs), decoder_loss)
    shape = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), shape)
    batch["weights"] = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def compiled(strategy, **sizes):
        layout = dataclasses.replace(strategy, remat="full")
        return sk.compile_step(
            adapted.loss_fn,
            optax.sgd(RATE),
            init=adapted.init,
            batch=batch,
            mesh=built(**sizes),
            strategy=layout,
        )

    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(0, 32, (8, 8)).astype(np.int32) for name in ("inputs", "targets")}
    tokens["segment_ids"] = np.sort(rng.integers(0, 2, (8, 8)), 1).astype(np.int32)
    tokens["weights"] = rng.integers(0, 2, (8, 8)).astype(np.float32)
    one = compiled(DATA, data=1)
    layout = DATA | pipeline(micro_batches=2) | sk.strategies.context()
    many = compiled(layout, data=2, pipe=2, context=2)
    start = on_host(one.init(jax.random.key(0)))
    want, got = (trained(step, start, tokens) for step in (one, many))
    assert_close(*(jax.tree.map(np.subtract, run[1], start.params) for run in (got, want)))
    assert_close(got, want)


@pytest.mark.slow
def test_wrong_ticks_are_found():
    def factory(mesh):
        return model.step(mesh, DATA | pipeline(micro_batches=4), 4, ROWS)

    batches = [model.make_batch(ROWS)]
    matrix = kill_matrix(
        factory, built(data=2, pipe=2), batches=batches, steps=2, mutations=PIPELINE_MUTATIONS
    )
    matrix.check()
