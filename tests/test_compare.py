"""Two reports side by side: what changed, and that nothing did."""

import dataclasses
import json

import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.source import Source
from shardkit.cli import main
from shardkit.report import Finding, Ledger, Program, Report, compare

from ._programs import LAYERS, make_mesh, program, recorded, rows, sgd, weights
from .test_html import row

MESH = (("fsdp", 4), ("tensor", 4))


@pytest.fixture(scope="module")
def data():
    parts = {"params": weights(), "batch": rows(P("data"))}
    return Report.of(program(sgd, make_mesh(data=8), whole=("params",), **parts))


@pytest.fixture(scope="module")
def tensor():
    split = weights(up=P(None, None, "tensor"), down=P(None, "tensor", None))
    mesh = make_mesh(data=2, tensor=4)
    return Report.of(program(sgd, mesh, params=split, batch=rows(P("data"))))


@pytest.fixture(scope="module")
def tpu():
    return Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), MESH, "tpu", "TPU v5p"))


def named(changes):
    return {change.name.strip(): change for change in changes}


def test_a_report_does_not_differ_from_itself_reopened(data, tpu):
    for report in (data, tpu):
        comparison = report.compare(Report.from_json(report.to_json()))
        assert not comparison
        assert str(comparison) == "Nothing changed."


def test_rounding_is_no_change(data):
    one, noisy, less = (
        dataclasses.replace(data, reductions={"data": n}) for n in (1, 1 + 1e-15, 0.9)
    )
    assert not compare(one, noisy)
    assert compare(one, less)


def test_the_other_layout_of_the_same_step(data, tensor):
    comparison = compare(data, tensor)
    assert comparison.target == (("mesh", "data=8", "data=2, tensor=4"),)
    assert (
        "params up",
        f"f32[{LAYERS},8,32] P()",
        f"f32[{LAYERS},8,32] P(None, None, 'tensor')",
    ) in comparison.layouts
    assert "params up: f32[" in str(comparison)
    head, details = named(comparison.headlines), named(comparison.details)
    sent = head["sent per step"]
    assert (sent.before, sent.after) == (data.ledger.total(), tensor.ledger.total())
    assert "model FLOPs" not in head
    over = details["sent over tensor"]
    assert (over.before, over.after) == (0, tensor.ledger.total("tensor"))
    params = details["memory params"]
    assert params.before == data.memory.params == 4 * tensor.memory.params
    assert params.ratio == 0.25


def test_collectives_added_removed_and_resized(data, tensor):
    rows_of = named(compare(data, tensor).rows)
    added = rows_of["all-reduce of f32 over tensor in mlp (forward)"]
    assert (added.before, added.note) == (None, "added")
    assert added.after == sum(
        row.wire_bytes for row in tensor.ledger.where("tensor", phase="forward")
    )
    back = named(compare(tensor, data).rows)["all-reduce of f32 over tensor in mlp (forward)"]
    assert (back.before, back.after, back.note) == (added.after, None, "removed")
    once = dataclasses.replace(
        tensor.ledger,
        rows=tuple(
            dataclasses.replace(row, trips=1, wire_bytes=row.wire_bytes // LAYERS)
            if row.axes == ("tensor",) and row.phase == "forward"
            else row
            for row in tensor.ledger
        ),
    )
    fewer = compare(tensor, dataclasses.replace(tensor, ledger=once))
    (resized,) = (one for one in fewer.rows if "(forward)" in one.name)
    assert (resized.after, resized.note) == (added.after // LAYERS, f"×{LAYERS} → ×1")


def test_rows_are_sorted_by_what_changed_most(data, tensor):
    changes = [(row.after or 0) - (row.before or 0) for row in compare(data, tensor).rows]
    assert changes == sorted(changes, key=abs, reverse=True)


def test_findings_come_and_go_whatever_their_bytes(data):
    finding = Finding(
        "replicated",
        leaf="params/w",
        axes=("data",),
        bytes=64,
        why="all 8 hold it",
        fix="split it",
    )
    one = dataclasses.replace(data, findings=(finding,))
    larger = dataclasses.replace(data, findings=(dataclasses.replace(finding, bytes=128),))
    assert compare(data, one).new == compare(one, data).gone == (finding,)
    assert compare(one, larger).new == ()
    assert "new:  replicated params/w, 64 B: all 8 hold it" in str(compare(data, one))
    assert "gone: replicated params/w, 64 B: all 8 hold it" in str(compare(one, data))
    kept = dataclasses.replace(data, kept=(finding,))
    for changes in (compare(kept, one), compare(one, kept)):
        assert (changes.new, changes.gone) == ((), ())


def test_text_folds_what_is_kept(data):
    kept = Finding("resharding", bytes=64, why="moved", fix="")
    text = str(dataclasses.replace(data, kept=(kept,) * 8))
    assert text.count("send less: resharding 64 B.\n") == 5
    assert "and 3 more that are kept\n" in text


def test_a_fix_that_an_earlier_version_tried_is_read_as_tried(data):
    finding = Finding("resharding", bytes=64, why="moved", fix="split it", remaining=32)
    fields = json.loads(dataclasses.replace(data, findings=(finding,)).to_json())
    del fields["findings"][0]["tried"], fields["kept"]
    (read,) = Report.from_json(json.dumps(fields)).findings
    assert read == finding
    assert read.fix_title == "Fix"


def test_text_is_100_columns_with_the_most_important_first(data, tpu):
    text = str(compare(tpu, data))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "device: TPU v5p → cpu"
    assert lines[1] == "mesh: fsdp=4, tensor=4 → data=8"
    assert lines[3].startswith("step, modelled ")
    assert "more groups of collectives" in text


def test_an_incomplete_report_is_said_to_be(tpu):
    text = recorded("tpu_v5p_fsdp_tensor")
    cut = Report.of(Program(text[: len(text) // 2], MESH, "tpu", "TPU v5p"))
    assert "The second report is incomplete: the text ends inside" in str(compare(tpu, cut))


def test_the_command_line_compares_two_files(data, tensor, tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name, report in zip(names, (data, tensor), strict=True):
        with open(name, "w") as file:
            file.write(report.to_json())
    assert main(["report", *names]) == 0
    assert capsys.readouterr().out.strip() == str(compare(data, tensor))
    assert main(["report", names[0], names[0]]) == 0
    assert capsys.readouterr().out == "Nothing changed.\n"


def sent(file, line, code, **changes):
    """A collective of one line of code."""
    source = Source(file, line, "attend", (), code)
    return row(sources=(source,), operands=("f32[256]",), **changes)


def with_rows(data, *rows_of):
    return dataclasses.replace(data, ledger=Ledger(rows_of, data.mesh))


def test_a_line_tells_which_of_its_collectives_changed(data):
    one = sent("/a/model.py", 3, "x @ w", wire_bytes=100)
    two = sent("/a/model.py", 3, "x @ w", wire_bytes=50, kind="all-gather")
    other = sent("/a/model.py", 9, "x + 1", wire_bytes=7)
    moved = dataclasses.replace(two, wire_bytes=4000)
    comparison = compare(with_rows(data, one, two, other), with_rows(data, one, moved, other))
    (line,) = comparison.sources
    assert (line.name, line.before, line.after) == ("model.py:3 in attend", 150, 4100)
    (part,) = line.parts
    assert (part.name, part.before, part.after) == ("  all-gather over data", 50, 4000)
    text = str(comparison).partition("by source line:")[2]
    assert text.index("model.py:3 in attend") < text.index("  all-gather over data")
    assert "all-reduce" not in text


def test_bytes_that_move_from_one_line_to_another_are_a_change(data):
    before = with_rows(data, sent("/a/model.py", 3, "x @ w", wire_bytes=100))
    after = with_rows(data, sent("/a/model.py", 9, "y @ w", wire_bytes=100))
    comparison = compare(before, after)
    assert comparison
    assert {(one.name, one.before, one.after) for one in comparison.sources} == {
        ("model.py:3 in attend", 100, 0),
        ("model.py:9 in attend", 0, 100),
    }


def test_a_line_is_followed_into_another_folder_where_that_is_certain(data):
    before = with_rows(data, sent("/a/model.py", 3, "x @ w", wire_bytes=100))
    other = sent("/b/model.py", 8, "x @ w", wire_bytes=100)
    assert not compare(before, with_rows(data, other)).sources
    third = sent("/c/model.py", 8, "x @ w", wire_bytes=1)
    unsure = compare(before, with_rows(data, other, third)).sources
    assert [(one.before, one.after) for one in unsure] == [(100, 0), (0, 100), (0, 1)]
