"""Documents packed into rows, and a decoder that reads them as if each stood alone."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkit as sk
from shardkit.data import Corpus, DataConfig, Text, open_shards, write_tokens
from shardkit.data._sequences import PackedSequences, pack_best_fit, segment_ids_at
from shardkit.data._stream import Stream, TokenFile
from shardkit.lm import DecoderConfig, batch_shapes, decoder_model

LENGTH = 16


def text_of(sizes, **changes):
    documents = [bytes(range(1, 1 + n)) + b"\0" for n in sizes]
    config = DataConfig(**{"seq_len": LENGTH, "batch_size": 4, "packing": True} | changes)
    return Text(Corpus("a test", b"".join(documents), bytes(range(1, 40)) + b"\0", 1, 1), config)


def stream_of(sizes, end):
    tail = [] if end is None else [end]
    parts = [[*range(1, 1 + n), *tail] for n in sizes]
    ends = np.cumsum([len(part) for part in parts])
    return Stream((TokenFile("a test", np.concatenate(parts), ends),), 256, end)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.sampled_from([None, 0]))
def test_every_token_with_a_next_one_is_in_one_row_beside_its_own_document(sizes, end):
    packed = PackedSequences(stream_of(sizes, end), LENGTH)
    n = packed.per_epoch
    if n == 0:
        assert end is None
        assert set(sizes) == {1}
        return
    batch = packed.make(np.arange(n), seed=0)
    pieces = []
    for row in range(n):
        ids, weights = batch["segment_ids"][row], batch["weights"][row]
        np.testing.assert_array_equal(weights, ids > 0)
        assert sorted(ids[ids > 0]) == list(ids[ids > 0])  # padding behind, segments in order
        for segment in range(1, ids.max() + 1):
            own = ids == segment
            inputs, targets = batch["inputs"][row][own], batch["targets"][row][own]
            assert own.any()
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            pieces.append((int(inputs[0]), targets.tolist()))
    if end is None:
        wanted = [list(range(1, 1 + k)) for k in sizes]
    else:
        wanted = [[0, *range(1, 1 + k), 0] for k in sizes]
    cut = [
        (whole[i], whole[i + 1 : i + 1 + LENGTH])
        for whole in wanted
        for i in range(0, len(whole) - 1, LENGTH)
    ]
    assert sorted(pieces) == sorted(cut)


def test_pack_best_fit_leaves_little_room():
    sizes = np.random.default_rng(0).integers(1, 100, 2000)
    row = pack_best_fit(sizes, 128)
    used = np.bincount(row, sizes)
    assert used.max() <= 128
    assert len(used) <= 1.02 * sizes.sum() / 128
    assert PackedSequences(stream_of(sizes.tolist(), None), 128).fill > 0.97


def test_rows_are_shuffled_by_epoch_and_any_step_can_be_asked_for_in_parts():
    text = text_of([5, 9, 14, 3, 30, 7, 8, 2, 11, 6, 13, 4], batch_size=2)
    n = text.rows_per_epoch
    assert n % 2 == 0
    rows = [row.tobytes() for i in range(n) for row in text.batch(i)["inputs"]]
    assert rows[:n] != rows[n:]
    assert sorted(rows[:n]) == sorted(rows[n:])
    np.testing.assert_array_equal(
        text.batch(3)["segment_ids"][1:], text.batch(3, slice(1, 2))["segment_ids"]
    )


def test_validation_rows_are_windows_that_know_their_documents(tmp_path):
    stream = stream_of([3, 4], 0)  # 0 | 1 2 3 0 | 1 2 3 4 0
    ids, follows = segment_ids_at(stream, np.arange(9)[None])
    assert ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 2]]
    assert follows.all()
    path = write_tokens(tmp_path / "x.bin", [[1, 2, 3], [4, 5, 6, 7]], 8)
    ids, follows = segment_ids_at(open_shards([path]), np.arange(6)[None])
    assert ids.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert follows.tolist() == [[True, True, False, True, True, True]]
    text = text_of([20] * 20)
    batches = [text.validation_batch(i) for i in range(text.validation_steps)]
    assert sum(b["weights"].sum() for b in batches) == text.validation_tokens == 40
    assert set(batches[0]) == {"inputs", "targets", "weights", "segment_ids"}


# --- the decoder


MODEL = decoder_model(DecoderConfig(vocab=48, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24))
TEXT = text_of([5, 9, 14, 3, 30, 7, 8, 2, 11, 6, 13, 4, 9, 9])


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def total(params, batch):
    loss = jax.jit(MODEL.loss_fn)(params, batch, jax.random.key(0))
    mean = loss[0] if isinstance(loss, tuple) else loss
    return float(mean.total), float(mean.weight)


def test_a_packed_row_costs_what_its_documents_cost_alone(params):
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: isinstance(x, sk.WithAxes))
    batch = TEXT.batch(0)
    alone = {name: np.zeros_like(x) for name, x in batch.items()}
    sums = np.zeros(2)
    for segment in range(1, batch["segment_ids"].max() + 1):
        for name, x in batch.items():  # each document at the beginning of a row of its own
            for row in range(len(x)):
                own = x[row][batch["segment_ids"][row] == segment]
                alone[name][row] = 0
                alone[name][row, : len(own)] = own
        sums += total(params, {k: v for k, v in alone.items() if k != "segment_ids"})
    np.testing.assert_allclose(total(params, batch), sums, rtol=1e-6)
    unmasked = {k: v for k, v in batch.items() if k != "segment_ids"}
    assert abs(total(params, unmasked)[0] / sums[0] - 1) > 1e-4  # the mask is what makes it so


def reference(params, batches, rate):
    """One device, written out: losses, the first gradients, and the last parameters."""

    def mean(params, batch):
        loss, _ = MODEL.loss_fn(params, batch, jax.random.key(0))
        return loss.total / loss.weight

    run, losses, first = jax.jit(jax.value_and_grad(mean)), [], None
    for batch in batches:
        loss, grads = run(params, batch)
        first = first or grads
        losses.append(float(loss))
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return losses, first, params


def relative(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


@pytest.mark.slow
def test_packed_rows_on_a_split_length_are_those_of_one_device(params):
    mesh = sk.MeshSpec(data=2, context=2).build(devices=jax.devices()[:4])
    batches = [TEXT.batch(i) for i in range(3)]
    step = sk.compile_step(
        MODEL.loss_fn,
        optax.chain(optax.trace(0.0), optax.sgd(0.3)),  # its state is the last gradients
        init=MODEL.init,
        batch=batch_shapes(TEXT.config),
        mesh=mesh,
        strategy=sk.strategies.data() | sk.strategies.context(),
    )
    assert step.batch_shardings["segment_ids"].spec == jax.P("data", "context")
    state = step.init(jax.random.key(0))
    want = reference(jax.tree.map(np.asarray, state.params), batches, 0.3)
    losses, first = [], None
    for batch in sk.data.Loader(TEXT, step.batch_shardings, stop=3):
        state, metrics = step(state, batch)
        first = first or jax.tree.map(np.asarray, state.opt_state[0].trace)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, want[0], rtol=1e-6)
    for name, got, leaf in (("gradient", first, want[1]), ("parameter", state.params, want[2])):
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(leaf), strict=True
        ):
            assert relative(x, y) <= 1e-5, (name, path)
