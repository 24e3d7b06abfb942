"""Which rows each process reads, with processes that are made up."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.data import place_rows, process_rows, rows_of_shardings
from shardkit.data._process import cut_shard

P = PartitionSpec


def by_eight(processes):
    """Devices in order, as many to each process."""
    return lambda device: device.id * processes // 8


def mesh_of(**sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


def test_two_processes_read_half_each_and_share_what_a_model_axis_splits():
    mesh = mesh_of(data=4, tensor=2)
    assert [list(process_rows(mesh, P("data"), 8, i, by_eight(2))) for i in range(2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    # Eight processes: neighbours along `tensor` hold the same rows.
    eight = [list(process_rows(mesh, P("data"), 8, i, by_eight(8))) for i in range(8)]
    assert eight == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    everything = [list(process_rows(mesh, P(None, "data"), 4, i, by_eight(2))) for i in range(2)]
    assert everything == [[0, 1, 2, 3]] * 2
    assert list(process_rows(mesh, P("data"), 8)) == list(range(8))


def test_rows_over_an_axis_across_processes_need_not_be_neighbours():
    mesh = mesh_of(data=2, fsdp=4)
    rows = process_rows(mesh, P(("fsdp", "data")), 16, 0, by_eight(2))
    assert list(rows) == [0, 1, 4, 5, 8, 9, 12, 13]


def test_what_cannot_be_given_to_processes_says_why():
    mesh = mesh_of(data=4, tensor=2)
    with pytest.raises(sk.errors.DataError) as error:
        process_rows(mesh, P("data"), 6, 0, by_eight(2))
    assert "batch of 6 rows" in str(error.value)
    assert "do not split 4 ways, over ('data',) of mesh (data=4, tensor=2)" in str(error.value)
    assert "Fix: batch=8" in str(error.value)
    with pytest.raises(
        sk.errors.DataError, match=r"process 7 +has no device .* processes \[0, 1\] have"
    ):
        process_rows(mesh, P("data"), 8, 7, by_eight(2))


def test_leaves_that_are_laid_out_apart_need_what_any_of_them_needs():
    mesh = mesh_of(data=4, tensor=2)
    both = {"x": NamedSharding(mesh, P("data")), "y": NamedSharding(mesh, P())}
    assert list(rows_of_shardings(both, 4)) == [0, 1, 2, 3]


def test_placed_rows_are_the_global_batch():
    mesh = mesh_of(data=2, context=2, tensor=2)
    batch = {"x": np.arange(32).reshape(4, 8), "y": np.arange(4.0)}
    shardings = {"x": NamedSharding(mesh, P("data", "context")), "y": NamedSharding(mesh, P())}
    placed = place_rows(batch, np.arange(4), 4, shardings)
    assert placed["x"].sharding == shardings["x"]
    assert placed["y"].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


@st.composite
def layouts(draw):
    sizes = draw(st.sampled_from([(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)]))
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    entry = draw(st.sampled_from([None, "data", "fsdp", ("data", "fsdp"), ("fsdp", "data")]))
    processes = draw(st.lists(st.integers(0, 7), min_size=8, max_size=8))
    return axes, entry, processes, draw(st.integers(1, 3)), draw(st.integers(0, 2**32))


@settings(max_examples=60)
@given(layouts())
def test_every_replica_group_reads_every_row_once_an_epoch_whatever_process_holds_its_devices(
    layout,
):
    axes, entry, processes, each, seed = layout
    mesh, rows, spec = mesh_of(**axes), 8 * each, P(entry)
    examples = 2 * rows + 5  # an epoch that ends within a batch
    data = sk.data.Arrays({"id": np.arange(examples)}, rows, seed)
    read_by = {d.id: [] for d in mesh.devices.flat}
    for process in set(processes):
        held = process_rows(mesh, spec, rows, process, lambda d: processes[d.id])
        index = NamedSharding(mesh, spec).devices_indices_map((rows,))
        own = {d: where for d, where in index.items() if processes[d.id] == process}
        # Nothing is read that no device of the process holds.
        assert set(held) == {row for (where,) in own.values() for row in np.arange(rows)[where]}
        for step in range(3):
            part = data.batch(step, held)["id"]
            for device, where in own.items():
                read_by[device.id].append(cut_shard(part, held, rows, where))
    order = np.concatenate([data.batch(step)["id"] for step in range(3)])
    assert sorted(order[:examples]) == list(range(examples))
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    for group in replica_groups(mesh, names):
        steps = [np.concatenate(each) for each in zip(*(read_by[d] for d in group), strict=True)]
        np.testing.assert_array_equal(np.concatenate(steps), order)


def replica_groups(mesh, names):
    """Devices that together hold a batch once, in the order of its rows."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    rest = [i for i, axis in enumerate(mesh.axis_names) if axis not in names]
    order = rest + [mesh.axis_names.index(name) for name in names]
    ways = math.prod(mesh.shape[name] for name in names)
    return ids.transpose(order).reshape(-1, ways)
