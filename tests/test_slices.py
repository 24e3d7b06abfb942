"""What goes between TPU slices: a recorded program of 4 slices of 2 x 2 v5e, mesh a=2, b=2, c=4."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.tree import Leaf
from shardkit.hardware import CHIPS
from shardkit.parallel import strategies
from shardkit.report import PlacedLeaf, Program, Report, read_ledger
from shardkit.report._program import Declarations
from shardkit.report.communication._links import Links
from shardkit.step._report import _dcn_axes

from ._programs import recorded

MESH, DCN = (("a", 2), ("b", 2), ("c", 4)), (("a", 2), ("b", 2))
V = 4 * 8 * 1024  # bytes that each device holds of f32[128,1024]
# What each of the six operations of the program becomes: kind, axes, between slices, wire bytes.
ROWS = {
    "one": [
        ("all-reduce", ("c",), False, 2 * 3 * V // 4),  # psum over b and c: first in each slice,
        ("all-reduce", ("b",), True, 2 * V // 4 // 2),  # then a quarter of it between two slices,
        ("all-gather", ("c",), False, 3 * V // 4),  # then the quarters in each slice again
    ],
    "two": [("all-gather", ("a",), True, V)],
    "three": [("reduce-scatter", ("b",), True, V // 2)],
    "four": [("all-to-all", ("b",), True, V // 2)],
    "five": [("collective-permute", ("a",), True, V)],
    "six": [("all-reduce", ("a", "b"), True, 2 * 3 * V // 4)],
}


@pytest.fixture(scope="module")
def text():
    return recorded("tpu_v5e_slices")


@pytest.fixture(scope="module")
def ledger(text):
    return read_ledger(text, MESH, DCN)


@pytest.mark.parametrize("scope", ROWS)
def test_what_crosses_slices_is_in_the_ledger_with_the_scope_it_came_from(ledger, scope):
    found = [(row.kind, row.axes, row.dcn, row.wire_bytes) for row in ledger if row.scope == scope]
    assert found == ROWS[scope]


def test_every_row_was_read(ledger):
    assert ledger.complete
    assert len(ledger) == sum(map(len, ROWS.values()))
    assert "over b between slices of f32 8.00 KiB" in str(ledger[1])


def test_without_the_slices_the_text_is_not_understood(text):
    assert not read_ledger(text, MESH).complete


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("ALL_TO_ALL", "SHUFFLE", "send send.3: an unknown kind of collective"),
        ("_xla_megascale_target", "_xla_goal", "its slices are not in a known form"),
    ],
)
def test_what_cannot_be_read_makes_the_totals_lower_bounds(text, old, new, problem):
    ledger = read_ledger(text.replace(old, new), MESH, DCN)
    assert any(problem in one for one in ledger.problems)


def test_rows_between_slices_go_over_the_network(ledger):
    chip = CHIPS["v5e"]
    links = Links(chip, MESH, ("a", "b"))
    inside, between = ledger[0], ledger[1]
    assert links.seconds(between) == pytest.approx(2 * chip.latency + V // 4 / chip.network)
    assert links.seconds(inside) < 7 * chip.latency + 1.5 * V / chip.link


def reported(text, **fields):
    made = Program(text, MESH, "tpu", "TPU v5 lite", dcn=DCN, **fields)
    return Report.of(made)


def test_the_schedule_waits_where_the_result_arrives(text, ledger):
    timeline = reported(text).timeline
    assert not [one for one in timeline.problems if "in no schedule" in one]
    links = Links(CHIPS["v5e"], MESH, ("a", "b"))
    wire = sum(links.seconds(row) for row in ledger)
    assert sum(timeline.communication.values()) == pytest.approx(wire)
    assert all(row.overlapped for row in ledger if row.dcn)


def test_the_parts_of_an_all_reduce_are_explained_by_data_parallelism(text):
    declared = Declarations(kinds=(strategies.data("a") | strategies.data("b")).kinds)
    scopes = {
        one.scope
        for one in reported(text, declared=declared).findings
        if one.kind == "unexplained_collective"
    }
    # What is over `c` alone, and what no data parallelism sends.
    assert {"four", "five"} <= scopes
    assert not {"three", "six"} & scopes


PACKED = """HloModule m, is_scheduled=true, num_partitions=4
ENTRY %main (x: f32[16,64]) -> f32[2,8,128] {
  %x = f32[16,64] parameter(0)
  %sum = f32[] reduce(%x), metadata={op_name="jit(run)/jvp(loss)/reduce_sum"}
  %up = f32[1024] bitcast(%x), metadata={op_name="jit(run)/transpose(jvp(loss))/dot_general"}
  %down = f32[512] bitcast(%x), metadata={op_name="jit(run)/transpose(jvp(loss))/mlp/dot_general"}
  %packed = f32[2,8,128] concatenate(%sum, %up, %down)
  %token = token[] after-all()
  %send = (f32[2,8,128], u32[], token[]) send(%packed, %token), channel_id=2, HERE,
    _xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[2,8,128], u32[], token[]) recv(%token), channel_id=1, HERE}
  %done = (f32[2,8,128], token[]) recv-done(%recv), channel_id=1
  ROOT %y = f32[2,8,128] get-tuple-element(%done), index=0
}
""".replace("HERE", 'frontend_attributes={_xla_host_transfer_rendezvous="sum_0"')


def test_gradients_packed_with_the_loss_are_reduced_once_between_slices():
    leaves = tuple(
        PlacedLeaf("params", Leaf(path, shape, np.dtype("float32")), P())
        for path, shape in {"up": (16, 64), "down": (8, 64)}.items()
    )
    batch = PlacedLeaf("batch", Leaf("x", (16, 64), np.dtype("float32")), P("data"))
    mesh, dcn = (("data", 2), ("tensor", 4)), (("data", 2),)
    report = Report.of(
        Program(PACKED, mesh, "tpu", "TPU v5 lite", leaves=(*leaves, batch), dcn=dcn)
    )
    (row,) = report.ledger
    assert (row.phase, row.kind, row.wire_bytes, row.dcn) == ("backward", "all-reduce", 8192, True)
    assert report.reductions == {"data": 1.0}
    report.check(sk.Budget(reductions_per_step={"data": 1}))


# Gradients over data, 2 slices with 2 devices of it in each: inside of a slice, then between them.
HALVED = """HloModule m, is_scheduled=true, num_partitions=2
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
ENTRY %main (x: f32[16,64]) -> f32[16,64] {
  %x = f32[16,64] parameter(0)
  %inner = f32[16,64] all-reduce(%x), channel_id=3, replica_groups={{0,1}}, to_apply=%add,
    use_global_device_ids=true,
    metadata={op_name="jit(run)/transpose(jvp(loss))/dot_general"}
  %token = token[] after-all()
  %send = (f32[16,64], u32[], token[]) send(%inner, %token), channel_id=2, HERE,
    _xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[16,64], u32[], token[]) recv(%token), channel_id=1, HERE}
  %done = (f32[16,64], token[]) recv-done(%recv), channel_id=1
  ROOT %y = f32[16,64] get-tuple-element(%done), index=0
}
""".replace("HERE", 'frontend_attributes={_xla_host_transfer_rendezvous="sum_0"')


def test_inside_of_a_slice_goes_a_part_of_an_axis_that_crosses_slices():
    weight = PlacedLeaf("params", Leaf("w", (16, 64), np.dtype("float32")), P())
    batch = PlacedLeaf("batch", Leaf("x", (16, 64), np.dtype("float32")), P("data"))
    declared = Declarations(kinds=strategies.data().kinds, reduce_dtype="f32")
    report = Report.of(
        Program(
            HALVED,
            (("data", 4),),
            "tpu",
            "TPU v5 lite",
            leaves=(weight, batch),
            dcn=(("data", 2),),
            declared=declared,
        )
    )
    size = 4 * 16 * 64
    found = [(row.axes, row.full_axes, row.dcn, row.wire_bytes) for row in report.ledger]
    assert found == [(("data",), False, False, size), (("data",), False, True, size)]
    # Each of the two parts counts for what it sends, not for a whole reduction over the axis.
    (least,) = report.minima
    assert least.wire == 2 * size
    assert least.bytes == 2 * 3 / 4 * size
    inside = "of gradients all-reduced inside each slice, where a reduce-scatter would do"
    assert least.excess == ((inside, size // 2),)
    # The gradient is reduced once, by both parts together.
    assert report.reductions == {"data": 1.0}


def test_slices_are_counted_along_each_axis():
    class Device:
        def __init__(self, slice_index):
            self.slice_index = slice_index

    grid = np.array([Device(n // 4) for n in range(16)]).reshape(2, 8)

    class Grid:
        devices, axis_names = grid, ("x", "y")

    assert _dcn_axes(Grid) == (("x", 2), ("y", 2))
