"""Every figure has one definition: text, page, CSV, JSON, table and picture say the same number."""

import csv
import functools
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from shardkit._core.io._palette import axis_colors
from shardkit._core.tree import format_bytes
from shardkit.config import load_config
from shardkit.report import Ledger, Minimum, Program, Report
from shardkit.report.communication._axis_traffic import measure_traffic
from shardkit.report.communication._minimum import axis_wire_bytes, divide_row
from shardkit.sweeps import Sweep, SweepCase, SweepRow
from shardkit.sweeps._plots import _draw_communication, _draw_memory
from shardkit.sweeps._row import compiled_figures

from ._programs import recorded
from ._quick import some_quick
from .test_html import report as synthetic
from .test_html import row, shown

MIB = 2**20
CONFIGS = ("nano", "fsdp_tensor", "pipeline")
CASES = ("several axes and an optimizer", "recorded", *CONFIGS)


@functools.cache
def report_of(name):
    if name in CONFIGS:
        config = load_config(name)
        return config.step_spec().compile(config.mesh.build()).report()
    if name == "recorded":
        mesh = (("fsdp", 4), ("tensor", 4))
        return Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", "TPU v5p"))
    rows = [
        row(axes=("data",), wire_bytes=300_000, payload_bytes=300_000),
        row(axes=("data", "tensor"), kind="all-gather", wire_bytes=700_001, group=8),
        row(axes=("tensor",), wire_bytes=2_000_000, payload_bytes=MIB, by_optimizer=True),
        row(axes=("tensor",), wire_bytes=1_000_003, overlapped=True),
        row(axes=("data", "tensor"), kind="collective-permute", wire_bytes=77, full_axes=False),
    ]
    sizes = {"data": 2, "tensor": 4}
    wire = axis_wire_bytes(Ledger(tuple(rows), (*sizes.items(),)), "tensor", sizes, {"tensor"})
    return synthetic(rows, minima=(Minimum("tensor", "tensor", 500_000.0, wire),))


@pytest.mark.parametrize("name", some_quick(CASES, *CASES[:2]))
def test_every_view_gives_the_same_bytes(name):
    report = report_of(name)
    case = SweepCase(report.mesh)
    swept = SweepRow(case, "ok", {"target": "local"}, compiled=compiled_figures(report))
    swept = SweepRow(**{**vars(swept), "measured": {"compile_seconds": {"whole": 1.0}}})
    sweep = Sweep((swept,), Path(), "one")
    total, text, page = format_bytes(report.ledger.total()), str(report), shown(report)
    saved = json.loads(report.to_json())
    (cells,) = csv.DictReader(io.StringIO(sweep.to_csv()))

    assert sum(axis.sent for axis in report.traffic) == report.ledger.total() == saved["sent"]
    assert f"Sent per step: {total}" in text
    assert total in page.partition("Sent per step")[2][:60]
    assert total in str(sweep)
    assert int(cells["compiled wire bytes"]) == report.sent
    assert sum(bars(_draw_communication, swept).values()) == pytest.approx(report.sent / MIB)
    drawn = bars(_draw_communication, swept)
    assert bool(report.ticks) == ("pipe" in dict(report.mesh))
    for axis in report.traffic:
        assert next(one for one in saved["traffic"] if one["axis"] == axis.axis) == vars(axis)
        assert int(cells[f"compiled wire bytes {axis.axis}"]) == axis.sent
        assert int(cells[f"compiled optimizer wire bytes {axis.axis}"]) == axis.optimizer
        own, optimizer = drawn.get(axis.axis, 0), drawn.get(f"{axis.axis}, by the optimizer", 0)
        assert (own + optimizer) * MIB == pytest.approx(axis.sent, abs=1)
        assert optimizer * MIB == pytest.approx(axis.optimizer, abs=1)
        if axis.collectives:
            assert re.search(rf"^{axis.axis} +{format_bytes(axis.sent)} ", text, re.M)
            assert f"|{axis.axis}|" in page
            assert format_bytes(axis.sent) in page
        if axis.minimum:
            splitting = set(dict(report.mesh))
            moves = [row for row in report.ledger if row.moves_matrices]
            moved = sum(
                divide_row(r, dict(report.mesh), splitting).get(axis.axis, 0) for r in moves
            )
            known = axis.sent - axis.optimizer + moved
            assert axis.ratio == pytest.approx(known / axis.minimum, rel=1e-4)


@pytest.mark.parametrize("name", some_quick(CASES, *CASES[:2]))
def test_the_picture_of_memory_has_every_class_of_the_table(name):
    report = report_of(name)
    swept = SweepRow(SweepCase(report.mesh), "ok", {}, compiled=compiled_figures(report))
    memory = report.memory
    held = memory.arguments + sum(n or 0 for n in (memory.padding, memory.output, memory.temp))
    assert sum(bars(_draw_memory, swept).values()) == pytest.approx(held / MIB)


def bars(draw, row):
    """Name of each part of a picture's bars → its width."""
    axes = Figure().subplots()
    draw(axes, [row])
    return {
        container.get_label(): sum(patch.get_width() for patch in container)
        for container in axes.containers
    }


def test_a_row_over_several_axes_loses_and_doubles_no_byte():
    sizes = {"data": 2, "fsdp": 4, "tensor": 8}
    one = row(axes=("data", "fsdp", "tensor"), kind="all-gather", wire_bytes=63, group=64)
    assert divide_row(one, sizes, {"fsdp"}) == {"fsdp": 48, "data": 8, "tensor": 7}
    for wire in range(1, 40):
        parts = divide_row(row(axes=("data", "tensor"), wire_bytes=wire), sizes, set())
        assert sum(parts.values()) == wire


def test_collectives_of_no_known_axis_are_counted_too():
    ledger = Ledger((row(axes=(), wire_bytes=5), row(axes=("data",), wire_bytes=7)), (("data", 2),))
    assert {one.axis: one.sent for one in measure_traffic(ledger, ())} == {"data": 7, "": 5}


def test_an_axis_has_one_color_in_page_and_picture_and_no_other_axis_has_it():
    names = ["data", "fsdp", "tensor", "context", "pipe", "expert"]
    colors = axis_colors(names)
    assert len(set(colors.values())) == len(names)
    for name in names:
        assert axis_colors([name]) == {name: colors[name]}
    crowd = [f"axis{n}" for n in range(8)]
    assert len(set(axis_colors(crowd).values())) == 8
    report = report_of(CASES[0])
    assert json.loads(report.to_json())["colors"] == axis_colors(["data", "tensor"])
    axes = Figure().subplots()
    _draw_communication(
        axes, [SweepRow(SweepCase(report.mesh), "ok", {}, compiled=compiled_figures(report))]
    )
    drawn = {c.get_label(): to_hex(c.patches[0].get_facecolor()) for c in axes.containers}
    assert drawn["data"] == colors["data"]
    assert drawn["tensor, by the optimizer"] == colors["tensor"]
