"""What is alive over a step by hand, its timeline as a trace, and measured times beside it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.profiler import ProfileData

import shardkit as sk
from shardkit._core.errors import ReportError
from shardkit.report import CompiledBytes, Program, Report
from shardkit.report._saved import TickTable
from shardkit.report.memory import _history
from shardkit.report.time import _profile
from shardkit.report.time._timeline import format_seconds

from ._programs import recorded
from .test_html import EVIL, report, shown

MESH = (("fsdp", 4), ("tensor", 4))
KIB = 1024
# Made and last read:  a in 1–2, b in 2–3, c in 3 (d takes its memory), d in 4.
STEP = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[512]{0})->f32[512]{0}}

FileNames
1 "/home/ada/%s.py"

FunctionNames
1 "attend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=8 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=0}

ENTRY %%main (x: f32[512]) -> f32[512] {
  %%x = f32[512]{0} parameter(0)
  %%a = f32[512]{0} tanh(%%x), metadata={op_name="jit(step)/jvp(loss)/tanh" stack_frame_id=1}
  %%b = f32[1024]{0} concatenate(%%a, %%a), dimensions={0}, metadata={op_name="jit(step)/jvp(loss)/concatenate"}
  %%c = f32[512]{0} slice(%%b), slice={[0:512]}, metadata={op_name="jit(step)/transpose(jvp(loss))/slice"}
  ROOT %%d = f32[512]{0} negate(%%c), metadata={op_name="jit(step)/update/neg"}
}
"""  # noqa: E501


def made(name="model"):
    memory = CompiledBytes(argument=2 * KIB, output=2 * KIB, alias=0, temp=6 * KIB)
    return Report.of(Program(STEP % name, (("data", 2),), "cpu", memory=memory))


def test_what_is_alive_at_each_moment_adds_up_by_hand():
    peak = made().peak
    history = peak.history
    assert (history.moments, history.at) == (4, (0, 1, 2, 3, 4))
    alive = [sum(sizes) for sizes in zip(*history.classes.values(), strict=True)]
    assert alive == [0, 2 * KIB, 6 * KIB, 6 * KIB, 2 * KIB]
    assert history.classes["outputs"] == (0, 0, 0, 0, 2 * KIB)
    assert history.phases == ("other", "forward", "forward", "backward", "update")
    assert (peak.moment, peak.bytes) == (2, 6 * KIB)
    spans = {one.name: (one.start, one.end, one.bytes) for one in history.buffers}
    assert spans == {
        "a": (1, 2, 2 * KIB), "b": (2, 3, 4 * KIB), "c": (3, 3, 2 * KIB), "d": (4, 4, 2 * KIB),
    }  # fmt: skip
    assert {one.name: one.where for one in history.buffers}["a"] == "model.py:42 in attend"


def test_a_long_schedule_is_drawn_in_few_columns_with_the_peak_among_them():
    full = Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), MESH, "tpu", "TPU v5p")).peak
    history = full.history
    assert len(history.at) <= 160 < history.moments
    at = history.at.index(full.moment)
    assert {name: sizes[at] for name, sizes in history.classes.items() if sizes[at]} == {
        name: size for name, size in full.classes.items() if size
    }
    assert len(json.dumps(dataclasses.asdict(history))) < 100_000


def test_a_column_is_the_fullest_moment_of_its_part(monkeypatch):
    monkeypatch.setattr(_history, "_COLUMNS", 3)
    assert _history._fullest_of_parts([0, 1, 4, 2, 5, 9, 6, 3, 2, 1]) == [2, 5, 8]


def test_the_page_names_the_buffer_and_the_line_of_a_moment():
    first = "find('memory').querySelector('input').listeners.input({ target: { value: '1' } });"
    page = shown(made(), first)
    assert "Moment 1 of 4, forward" in page
    assert "2.00 KiB temporaries f32[512]| from model.py:42 in attend|: a" in page
    assert "Moment 2 of 4, forward" in shown(made())  # the peak


def test_names_with_markup_are_shown_and_never_parsed():
    assert "&lt;img&gt;.py:42" not in shown(made("<img>"))
    one = "find('memory').querySelector('input').listeners.input({ target: { value: '1' } });"
    assert "<img>.py:42 in attend" in shown(made("<img>"), one)
    assert "<img>" not in made("<img>").to_html()


def test_text_without_tables_says_that_no_line_is_known():
    text = (STEP % "model").partition("FileNames")[0]
    text += "ENTRY" + (STEP % "model").partition("ENTRY")[2]
    bare = Report.of(Program(text, (("data", 2),), "cpu"))
    assert {one.where for one in bare.peak.history.buffers} == {""}
    assert "from an unknown line" in shown(bare)


def test_a_pipelines_ticks_are_drawn_and_counted():
    table = TickTable("pipe", EVIL, (("F0", "B0", ""), ("", "F0", "B0")))
    one = report(mesh=(("pipe", 2),), ticks=(table,), rows=[], leaves=())
    assert str(table) == f"pipe runs {EVIL}: 3 ticks, 33% idle"
    assert f"pipe runs {EVIL}: 3 ticks, 33% idle." in str(one).replace("\n    ", "")
    assert f" runs {EVIL}: 3 ticks, 33.3 % of them idle" in shown(one)
    assert Report.from_json(one.to_json()) == one


def test_a_trace_has_every_block_of_the_step_at_its_place(tmp_path):
    step = Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), MESH, "tpu", "TPU v5p"))
    path = step.to_trace(tmp_path / "step.json")
    trace = json.loads(path.read_text())
    events = [one for one in trace["traceEvents"] if one["ph"] == "X"]
    names = {one["tid"]: one["args"]["name"] for one in trace["traceEvents"] if one["ph"] == "M"}
    took = {names[tid]: 0.0 for tid in sorted(names)}
    for one in events:
        assert one["ts"] >= 0
        assert one["dur"] > 0
        took[names[one["tid"]]] += one["dur"] / 1e6
    timeline = step.timeline
    assert took["compute"] == pytest.approx(timeline.compute)
    assert took["communication, exposed"] == pytest.approx(timeline.exposed)
    assert took["compute"] + took["communication, exposed"] == pytest.approx(timeline.high)
    last = max(one["ts"] + one["dur"] for one in events)
    assert last == pytest.approx(timeline.high * 1e6)
    assert trace["otherData"]["label"] == "modelled"
    assert len(timeline.collectives) == len(step.ledger)


def test_without_a_modelled_time_there_is_no_trace(tmp_path):
    with pytest.raises(ReportError, match="cpu is not in the hardware table") as error:
        made().to_trace(tmp_path / "step.json")
    assert 'step.report(chip="v5p")' in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A step of two devices, a profile of three updates and an evaluation, and its report."""
    step = sk.compile_step(
        lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2),
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((8, 4))},
        batch=jax.ShapeDtypeStruct((4, 8), jnp.float32),
        mesh=sk.MeshSpec(data=2).build(devices=jax.devices()[:2]),
        strategy=sk.strategies.data(),
    )
    state, batch = step.init(jax.random.key(0)), jnp.ones((4, 8))
    state, _ = step(state, batch)
    step.evaluate(state, batch)
    folder = tmp_path_factory.mktemp("profile")
    with jax.profiler.trace(str(folder)):
        for _ in range(3):
            state, _ = step(state, batch)
        jax.block_until_ready((state, step.evaluate(state, batch)))
    return step, folder


def test_measured_times_are_those_of_the_profile(profiled):
    step, folder = profiled
    one = step.report(chip="v5p").with_profile(folder)
    (file,) = folder.rglob("*.xplane.pb")
    names = {row.name for row in one.ledger}
    runs = {}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name in names and "hlo_op" in stats:
                    runs.setdefault(stats["run_id"], []).append((event.name, event.duration_ns))
    whole = [events for events in runs.values() if {name for name, _ in events} == names]
    assert one.measured.executions == (2 * 3,) * len(one.ledger)  # no evaluation among them
    for row, seconds in zip(one.ledger, one.measured.collectives, strict=True):
        times = [ns for events in whole for name, ns in events if name == row.name]
        assert len(times) == 6
        assert seconds == pytest.approx(sum(times) / 6 / 1e9)
    assert Report.from_json(one.to_json()) == one
    longest = max(one.measured.collectives)
    lines = str(one).partition("measured by the profile")[2].splitlines()
    assert any(f"  {format_seconds(longest)}  " in line for line in lines)
    page = shown(one)
    assert "measured" in page
    assert "Nothing on this page was measured" not in page
    assert one.with_profile(file).measured.collectives == one.measured.collectives


def test_other_programs_with_collectives_of_the_same_name_do_not_count(profiled, monkeypatch):
    step, folder = profiled
    ledger = step.report().ledger
    names = ["all-reduce.1", "all-reduce.2"]
    rows = tuple(dataclasses.replace(ledger[0], name=name, trips=4) for name in names)
    train, evaluate = ("jit_run", 0, 1), ("jit_run", 0, 2)
    events = [(train, names[0], 1.0), (train, names[1], 2.0), (evaluate, names[0], 50.0)]
    monkeypatch.setattr(_profile, "_read_events", lambda file: iter(events))
    measured = _profile.read_profile(folder, dataclasses.replace(ledger, rows=rows))
    assert measured.collectives == (4.0, 8.0)
    assert measured.executions == (1, 1)


def test_a_profile_that_is_not_there_or_not_of_this_step_is_refused(profiled, tmp_path):
    step, folder = profiled
    one = step.report()
    with pytest.raises(ReportError, match="does not exist"):
        one.with_profile(tmp_path / "gone")
    with pytest.raises(ReportError, match=r"has no \*\.xplane\.pb"):
        one.with_profile(tmp_path)
    (tmp_path / "text.xplane.pb").write_text("no profile")
    with pytest.raises(ReportError, match="is not a profile"):
        one.with_profile(tmp_path)
    other = report()
    with pytest.raises(ReportError, match="has no event of the 1 collectives of this step"):
        other.with_profile(folder)


def test_a_pipeline_tells_its_table_where_it_has_stages():
    ((_, layers),) = sk.strategies.pipeline(schedule="gpipe", micro_batches=2).overrides
    rows = (("F0", "F1", "", "", "B0", "B1"), ("", "F0", "F1", "B0", "B1", ""))
    assert layers.tick_table({"data": 2, "pipe": 2}) == ("gpipe", rows)
    assert layers.tick_table({"data": 2, "pipe": 1}) is None
