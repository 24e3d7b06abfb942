"""The files of a step: any zarr reader opens them, and every process says what it has written."""

import json
import math
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given
from hypothesis import strategies as draw
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.checkpoint import _grid, _write
from shardkit.checkpoint._files import step_folder

DTYPES = ["float32", "bfloat16", "float8_e5m2", "int4", "uint8", "bool", "complex64", "int32"]
SHAPES = {(): [()], (3,): [()], (8, 6): [(), ("data",), (("data", "tensor"),)]}
SHAPES |= {(4, 2, 12): [("data", None, "tensor"), (None, "data", "tensor")], (0, 4): [()]}


def leaves():
    mesh = sk.MeshSpec(data=2, tensor=4).build()
    made = {}
    for name in DTYPES:
        for shape, specs in SHAPES.items():
            for spec in specs:
                values = np.arange(math.prod(shape)).reshape(shape) % 7
                x = jnp.asarray(values).astype(name)
                where = NamedSharding(mesh, PartitionSpec(*spec))
                made[f"{name} {shape} {spec}"] = jax.device_put(x, where)
    return made


@pytest.mark.parametrize("chunk_bytes", [16, 2**22])
def test_another_reader_reads_the_arrays_too(chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(_grid, "_CHUNK_BYTES", chunk_bytes)
    given = leaves()
    sk.Checkpointer(tmp_path).save(1, given)
    back = sk.Checkpointer(tmp_path).restore(given).state
    for name, x in given.items():
        np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(x), err_msg=name)
        # NumPy has a letter for these only; the reader knows the others by another name.
        if x.size and x.dtype.name in ("float32", "bfloat16", "int32", "bool", "complex64"):
            folder = step_folder(tmp_path, 1) / "arrays/state" / urllib.parse.quote(name, "()=,")
            folder = next(
                p for p in folder.parent.iterdir() if urllib.parse.unquote(p.name) == name
            )
            store = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
            read = tensorstore.open(store, open=True).result().read().result()
            np.testing.assert_array_equal(read, np.asarray(x), err_msg=name)


@given(
    shard=draw.lists(draw.integers(1, 70_000), max_size=3).map(tuple),
    itemsize=draw.sampled_from([1, 2, 4, 8]),
    wanted=draw.sampled_from([2**12, 2**16, 2**22]),
)
def test_chunks_divide_shards_and_are_not_far_from_what_is_wanted(shard, itemsize, wanted):
    chunk = _grid.choose_chunk(shard, itemsize, wanted)
    assert all(n % part == 0 for n, part in zip(shard, chunk, strict=True))
    size, whole = math.prod(chunk) * itemsize, math.prod(shard) * itemsize
    assert size == whole if whole <= 2 * wanted else size > wanted / 16 or 1 in chunk


def test_a_dim_that_nothing_divides_is_one_chunk():
    assert _grid.choose_chunk((50257, 768), 4, 2**22) == (1733, 768)
    assert _grid.choose_chunk((1_000_003, 4), 4, 2**22) == (1_000_003, 1)
    assert _grid.choose_chunk((), 4, 2**22) == ()


@pytest.fixture
def two(monkeypatch, tmp_path):
    """The first of two processes, of which the other has reached the barrier already."""
    monkeypatch.setattr(_write, "has_several_processes", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: lambda **_: None)
    return tmp_path


OWN = _write.Written(
    {"a/0": _write.SavedFile(4, "00000001")}, {"a": np.array([1, 2**32 - 1], np.uint32)}
)


def test_what_processes_have_written_is_added_up(two):
    theirs = {"files": {"a/1": [8, "00000002"]}, "sums": {"a": [2, 3], "b": [5, 6]}}
    (two / ".written-1").write_text(json.dumps(theirs))
    together = _write.collect(two, OWN)
    assert together is not None
    assert {name: file.bytes for name, file in together.files.items()} == {"a/0": 4, "a/1": 8}
    assert {leaf: x.tolist() for leaf, x in together.sums.items()} == {"a": [3, 2], "b": [5, 6]}
    assert not list(two.iterdir())


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (None, "process 1 +has left nothing that is seen here"),
        ("{", "process 1 +has left nothing that is seen here"),
        ('{"error": "No space left on device"}', "process 1 +No space left on device"),
    ],
)
def test_a_process_that_has_not_written_fails_the_save_by_name(theirs, why, two):
    if theirs is not None:
        (two / ".written-1").write_text(theirs)
    with pytest.raises(sk.errors.CheckpointError, match=why):
        _write.collect(two, OWN)


def test_a_process_that_fails_does_not_keep_the_others_waiting(two, monkeypatch):
    reached = []
    barrier = "orbax.checkpoint.multihost.get_barrier_sync_fn"
    monkeypatch.setattr(barrier, lambda: lambda **given: reached.append(given["key"]))
    with pytest.raises(sk.errors.CheckpointError, match=r"process 0 +full"):
        _write.collect(two, OSError("full"))
    with pytest.raises(FileNotFoundError):
        _write.collect(two / "gone", OWN)
    assert reached == [two.name, "gone"]
