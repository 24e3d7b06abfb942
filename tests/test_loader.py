"""Batches on their devices, ahead of the step: none lost, none twice, errors where they belong."""

import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.data import Arrays, Dataset, Loader, resume_step

P = PartitionSpec
TREE = {"x": np.arange(40).reshape(20, 2), "y": np.arange(20.0)}


@pytest.fixture(scope="module")
def shardings():
    mesh = sk.MeshSpec(data=4, tensor=2).build()
    return {"x": NamedSharding(mesh, P("data", "tensor")), "y": NamedSharding(mesh, P("data"))}


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_for_threads():
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


class Recorded:
    """Arrays that note which batches were made, and fail at one."""

    def __init__(self, data, bad=None):
        self.data, self.bad, self.made = data, bad, []

    @property
    def rows(self):
        return self.data.rows

    def batch(self, step, rows=slice(None)):
        if len(np.arange(self.rows)[rows]):
            self.made.append(step)
            if step == self.bad:
                raise OSError(f"the disk of batch {step}")
        return self.data.batch(step, rows)

    def state(self, step):
        return self.data.state(step)

    def __str__(self):
        return "the test"


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_come_in_order_laid_out_as_declared(shardings, prefetch):
    data = Arrays(TREE, rows=8)
    with Loader(data, lambda: shardings, start=2, stop=9, prefetch=prefetch) as loader:
        found = list(loader)
    assert len(found) == 7
    for step, batch in enumerate(found, 2):
        same(batch, data.batch(step))
        assert batch["x"].sharding == shardings["x"]
        assert batch["y"].dtype == np.float32


def test_reading_ahead_is_bounded_and_ends_with_the_block(shardings):
    data = Recorded(Arrays(TREE, rows=4))
    with Loader(data, shardings, prefetch=2) as loader:
        for _ in range(3):
            next(loader)
        deadline = time.monotonic() + 5
        while len(data.made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert data.made == [0, 1, 2, 3, 4]
        assert len(loader_threads()) == 1
        assert loader.state()["batch"] == 3
    wait_for_threads()
    assert list(loader) == []


def test_what_waits_to_be_read_is_dropped_when_the_loader_is_closed(shardings):
    release = threading.Event()

    class Slow(Recorded):
        def batch(self, step, rows=slice(None)):
            made = super().batch(step, rows)
            if self.made[-1:] == [1]:
                release.wait(5)
            return made

    data = Slow(Arrays(TREE, rows=4))
    with Loader(data, shardings, prefetch=3) as loader:
        next(loader)
        while data.made != [0, 1]:
            time.sleep(0.01)
    release.set()
    wait_for_threads()
    assert data.made == [0, 1]


def test_stopped_anywhere_and_resumed_no_batch_is_lost_or_twice(shardings):
    data, seen, state = Arrays(TREE, rows=4), [], None
    for takes in (1, 3, 0, 5):
        start = 0 if state is None else resume_step(state, Arrays(TREE, rows=4))
        with Loader(data, shardings, start=start) as loader:
            seen += [np.asarray(next(loader)["y"]) for _ in range(takes)]
            state = loader.state()
    np.testing.assert_array_equal(seen, [data.batch(i)["y"] for i in range(9)])


def test_an_error_is_raised_for_its_own_batch_and_the_batch_is_read_again(shardings):
    data = Recorded(Arrays(TREE, rows=4), bad=2)
    with Loader(data, shardings, prefetch=3) as loader:
        for i in range(2):
            same(next(loader), data.data.batch(i))
        with pytest.raises(OSError, match="the disk of batch 2"):
            next(loader)
        data.bad = None
        same(next(loader), data.data.batch(2))
        same(next(loader), data.data.batch(3))


def test_data_with_other_leaves_than_the_step_is_refused(shardings):
    data = Arrays({"x": TREE["x"], "label": TREE["y"]}, rows=4)
    with pytest.raises(sk.errors.BatchError) as error:
        next(Loader(data, shardings))
    assert "batch/label  comes from the arrays, but is not declared" in str(error.value)
    assert "batch/y      is declared, but the arrays has none" in str(error.value)
    assert "Fix: compile_step(..., batch={...}) with leaves label, x" in str(error.value)


def test_a_grain_dataset_is_rows_by_their_number(shardings):
    import grain

    rows = [{"x": x, "y": y} for x, y in zip(TREE["x"], TREE["y"], strict=True)]
    shuffled = grain.MapDataset.source(rows).seed(3).shuffle().repeat()
    data = Dataset(shuffled, rows=8)
    epochs = np.concatenate([data.batch(i)["y"] for i in range(5)])
    assert sorted(epochs[:20]) == sorted(epochs[20:40]) == sorted(TREE["y"])
    assert list(epochs[:20]) != list(epochs[20:40])
    with Loader(data, shardings, start=1, stop=2) as loader:
        same(next(loader), data.batch(1))
    listed = Dataset(rows, rows=8)
    np.testing.assert_array_equal(listed.batch(2)["y"], [16, 17, 18, 19, 0, 1, 2, 3])


def test_other_data_is_no_place_to_go_on(shardings):
    saved = Arrays(TREE, rows=4).state(7)
    assert resume_step(saved, Arrays(TREE, rows=4)) == 7
    changed = {**TREE, "y": TREE["y"] + 1}
    with pytest.raises(sk.errors.DataError) as error:
        resume_step(saved, Arrays(changed, rows=5, seed=1))
    message = str(error.value)
    assert message.startswith("The data differs from the checkpoint's: 3 values changed")
    assert "the arrays: rows   was 4, is 5" in message
    assert "the arrays: seed   was 0, is 1" in message
    assert "the arrays: crc32  was '" in message
    with pytest.raises(sk.errors.DataError, match=r"batch +was None, is 0"):
        resume_step({}, Arrays(TREE, rows=4))


def test_arrays_that_form_no_batches_are_named():
    with pytest.raises(sk.errors.DataError) as error:
        Arrays({"x": np.zeros((6, 2)), "y": np.zeros(6), "z": np.zeros(5), "n": 3}, rows=8)
    message = str(error.value)
    assert "z f64[5]  has no leading dim of 6 examples" in message
    assert "n i64[]   has no leading dim of 6 examples" in message
    assert "rows=8    there are 6 examples" in message


@settings(max_examples=40)
@given(
    st.integers(1, 7),
    st.integers(0, 2**40),
    st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=3),
)
def test_an_epoch_is_every_row_once_however_rows_are_given_to_processes(more, seed, masks):
    data = Arrays({"id": np.arange(8 * 3 + more)}, rows=8, seed=seed)
    n = data.rows_per_epoch
    whole = np.concatenate([data.batch(i)["id"] for i in range(2 * n // 8)])
    assert sorted(whole[:n]) == list(range(n))
    assert sorted(whole[n : 2 * n]) == sorted(set(whole[n : 2 * n]))
    for mask in masks:  # any share of the rows is the same rows of the same batches
        held = np.flatnonzero(mask)
        parts = [data.batch(i, held)["id"] for i in range(2 * n // 8)]
        np.testing.assert_array_equal(np.concatenate(parts), whole.reshape(-1, 8)[:, held].ravel())
