"""A sweep tries everything, loses nothing, and says where each figure is from."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.sweeps import ConfigFactory, SweepCase, SweepRow, draw_plots
from shardkit.sweeps import _sweep as sweep_module
from shardkit.sweeps._case_runner import ParityChecker, is_done, plan_figures
from shardkit.sweeps._journal import Journal
from shardkit.sweeps._row import MEMORY, OK, WRONG
from shardkit.sweeps._timing import SIMULATED

from . import _swept

AXES = ("data", "tensor")
TWO = {"axes": AXES, "devices": 2, "repeats": 2, "steps_per_repeat": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One and four devices; 4 rows in 2 micro-batches do not split over 4 devices."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    seen = []
    found = sk.sweep(
        _swept.declared,
        out=folder,
        axes=AXES,
        devices=(1, 4),
        accumulate=(2,),
        verify=True,
        time=True,
        repeats=2,
        steps_per_repeat=2,
        on_row=lambda row, done, total: seen.append((row.case.key, done, total)),
    )
    return found, seen


def by_key(found):
    return {row.case.key: row for row in found.rows}


def lines(folder):
    return (folder / "rows.jsonl").read_text().splitlines()


def test_every_factorization_is_a_row_and_none_is_dropped(whole):
    found, seen = whole
    assert len(found.rows) == 1 + 3
    assert len({key for key, _, _ in seen}) == 4
    assert [count for _, *count in seen] == [[n, 4] for n in (1, 2, 3, 4)] + [
        [n, 3] for n in (1, 2, 3)
    ]
    others = {row.case.key: row for row in found.unranked}
    assert list(others) == ["data=4,tensor=1 accumulate=2 remat=none"]
    (row,) = others.values()
    assert row.status == "illegal"
    assert "4 rows" in row.reason
    assert row.reason in " ".join(str(found).split())


def test_a_row_has_its_figures_under_the_word_that_says_where_they_are_from(whole):
    found, _ = whole
    row = by_key(found)["data=2,tensor=2 accumulate=2 remat=none"]
    memory = row.compiled["memory"]
    assert memory["params"] == _swept.WIDTH**2 * 4 // 2
    assert memory["batch"] == _swept.ROWS * _swept.WIDTH * 4 // 2
    assert memory["total"] >= memory["params"]
    assert row.compiled["axes"]["data"]["wire"] > 0
    assert 0 < row.compiled["wire"] == sum(w["wire"] for w in row.compiled["axes"].values())
    assert row.compiled["flops"]["model"] > 0
    assert row.measured["where"] == SIMULATED
    timed = row.measured["step_seconds"]
    assert 0 < timed["low"] <= timed["median"] <= timed["high"]
    assert timed["samples"] == 4
    assert row.measured["warm_up_seconds"] > 0
    assert {"whole", "trace", "lower", "compile"} <= row.measured["compile_seconds"].keys()
    assert row.verified["ok"] is True
    assert row.on["device_kind"] == "cpu"
    assert row.provenance["versions"]["jax"]
    assert row.provenance["date"].endswith("Z")


def test_the_model_of_a_plan_stands_beside_what_is_compiled(whole):
    found, _ = whole
    for row in found.ranked:
        memory = row.compiled["memory"]
        exact = sum(
            memory[part] for part in ("params", "opt_state", "model_state", "batch", "rest")
        )
        assert exact < row.modelled["memory"] < 2 * row.total
        assert row.modelled["problems"] == []
    split = by_key(found)["data=2,tensor=2 accumulate=2 remat=none"]
    # The loss and its metric are two numbers that a plan leaves out.
    assert split.modelled["axes"]["data"] == split.compiled["axes"]["data"]["wire"] - 8
    assert "Modelled by a plan, memory is" in str(found)


def test_what_a_plan_cannot_follow_is_said():
    declared = _swept.declared(sk.MeshSpec(data=1), accumulate=1, remat="none")
    uneven = sk.strategies.pipeline(micro_batches=2, layers_per_stage=(2, 1))
    for axis, strategy, why in (
        ("x", sk.strategies.expert("x"), "expert over x is not modelled"),
        ("pipe", uneven, "uneven stages are not modelled"),
    ):
        said = plan_figures(
            SweepCase(((axis, 2),)), dataclasses.replace(declared, strategy=strategy), None
        )
        assert said == {"not_modelled": f"NotImplementedError: {why}"}


def test_the_ranking_is_by_measured_time_and_the_table_fits(whole):
    found, _ = whole
    assert found.ranked_by == "measured step time"
    times = [row.seconds for row in found.ranked]
    assert times == sorted(times)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert SIMULATED in " ".join(text.split())
    assert "Not ranked: 1 of 4" in text
    assert "3 of 3 ranked rows give the numbers of one device." in text
    for row in found.ranked:
        assert row.case.shown in text


def test_csv_has_a_line_for_each_row(whole):
    found, _ = whole
    head, *rows = found.to_csv().splitlines()
    assert len(rows) == 4
    assert {"mesh", "status", "compiled bytes total", "measured step median"} <= set(
        head.split(",")
    )
    assert (found.folder / "rows.csv").read_text() == found.to_csv()


def test_plots_are_drawn_twice_each(whole):
    found, _ = whole
    drawn = draw_plots(found)
    names = {"memory", "communication", "time", "scaling", "model"}
    assert {path.name for path in drawn} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    assert all(path.stat().st_size > 2000 for path in drawn)
    assert (found.folder / "time.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_sweep_goes_on_and_a_half_line_is_dropped(whole, tmp_path):
    found, _ = whole
    kept = lines(found.folder)[:-2]
    # The header, all compiled rows, times of all but two, and the half of a line.
    (tmp_path / "rows.jsonl").write_text("\n".join(kept) + '\n{"key": "data=8,ten')
    seen = []
    again = sk.sweep(
        _swept.declared,
        out=tmp_path,
        axes=AXES,
        devices=(1, 4),
        accumulate=(2,),
        time=True,
        repeats=1,
        steps_per_repeat=2,
        on_row=lambda row, done, total: seen.append(row.case.key),
    )
    assert len(set(seen)) == 3  # what was illegal may be mended
    assert [row.case for row in again.rows] == [row.case for row in found.rows]
    assert all(row.seconds and row.verified for row in again.ranked)  # carried over
    assert all(json.loads(line) for line in lines(tmp_path))
    done = {key: row for key, row in by_key(again).items() if key not in seen}
    assert done == {key: row for key, row in by_key(found).items() if key not in seen}


def test_what_fails_or_runs_out_of_memory_is_a_row(tmp_path):
    found = sk.sweep(_swept.picky, out=tmp_path, axes=AXES, devices=4)
    rows = {row.case.shown: row for row in found.rows}
    assert rows["data=4"].status == OK
    assert rows["data=2,tensor=2"].status == "failed"
    assert rows["data=2,tensor=2"].reason == "KeyError: 'no such head'"
    assert rows["tensor=4"].status == MEMORY
    assert not is_done(rows["data=2,tensor=2"], prove=False, timed=False)
    assert is_done(rows["tensor=4"], prove=True, timed=True)
    assert "out of memory" in str(found)


def test_a_step_with_wrong_numbers_is_not_ranked(tmp_path, monkeypatch):
    verdict = {"ok": False, "why": "gradients: w is off by 1.0e+00, at most 1.0e-05"}
    monkeypatch.setattr(ParityChecker, "verdict", lambda self, step: verdict)
    found = sk.sweep(_swept.declared, out=tmp_path, axes=["data", "tensor"], devices=1, verify=True)
    assert not found.ranked
    assert found.rows[0].status == WRONG
    assert "w is off by 1.0e+00" in str(found)


def test_a_factory_that_ignores_what_it_is_asked_makes_no_row_that_lies(tmp_path):
    with pytest.raises(sk.errors.SweepError, match="None of 1 case is legal") as error:
        sk.sweep(_swept.deaf, out=tmp_path, axes=AXES, devices=1, accumulate=(2,))
    assert "is 2 in the case, the step has 1" in str(error.value)


def test_no_legal_mesh_is_one_error_and_the_rows_are_kept(tmp_path):
    with pytest.raises(sk.errors.SweepError, match=r"None of 2 cases is legal; see .*") as error:
        sk.sweep(_swept.declared, out=tmp_path, axes=AXES, devices=7)
    assert "is not divisible by" in str(error.value)
    assert "Fix" in str(error.value)
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"axes": ["data", "data"]}, "axis 'data'  is named twice"),
        ({"axes": ["da ta"]}, "axis 'da ta'"),
        ({"devices": 0}, "devices=0  is not a positive int"),
        ({"devices": 64}, "this process has 8 devices"),
        ({"accumulate": ()}, "accumulate=[]  is empty"),
        ({"remat": ["ful"]}, "unknown policy"),
        ({"repeats": 1, "steps_per_repeat": 1}, "at least two timed updates"),
        ({"target": "cpu:4", "devices": None, "time": True}, "needs devices that run"),
        ({"target": "cpu:4"}, "target cpu:4 has 4 devices"),
        ({"target": "tpu:v5z:4x4"}, "unknown chip 'v5z'"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(asked, message, tmp_path):
    with pytest.raises(sk.ShardkitError) as error:
        sk.sweep(_swept.declared, out=tmp_path / "new", **{**TWO, **asked})
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_all_that_is_wrong_is_in_one_message(tmp_path):
    with pytest.raises(sk.errors.SweepError) as error:
        sk.sweep(_swept.declared, out=tmp_path, axes=["a", "a"], devices=0, remat=["ful"])
    for word in ("'a'", "devices=0", "remat='ful'"):
        assert word in str(error.value)


def test_a_lambda_cannot_be_sent_to_a_target(tmp_path):
    with pytest.raises(sk.errors.SweepError, match="at the top of a module of its own"):
        sk.sweep(lambda mesh, **asked: None, out=tmp_path, target="cpu:4")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(sk.errors.SweepError, match=r"holds thesis\.tex, and no rows\.jsonl"):
        Journal(tmp_path, {})
    (tmp_path / "rows.jsonl").write_text("a file of mine")
    with pytest.raises(sk.errors.SweepError, match="is not the file of a sweep"):
        Journal(tmp_path, {})
    assert (tmp_path / "rows.jsonl").read_text() == "a file of mine"
    with pytest.raises(sk.errors.SweepError, match="is a file"):
        Journal(tmp_path / "thesis.tex", {})
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "thesis.tex"]


def test_a_file_of_another_format_version_is_refused_and_left_alone(tmp_path):
    before = '{"identity": {}, "shardkit_sweep": 1}\n'
    (tmp_path / "rows.jsonl").write_text(before)
    with pytest.raises(sk.errors.SweepError, match="has format version 1") as error:
        Journal(tmp_path, {})
    assert "--out NEW_FOLDER" in str(error.value)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_rows_of_another_config_are_refused_with_every_difference(tmp_path):
    with Journal(tmp_path, {"model": {"num_layers": 4, "embed_dim": 8}}) as journal:
        journal.add(SweepRow(SweepCase((("data", 1),)), OK, {}))
    before = (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(sk.errors.SweepError, match="holds rows of another sweep") as error:
        Journal(tmp_path, {"model": {"num_layers": 2, "embed_dim": 8}, "data": 3})
    assert "model.num_layers  was 4 there, is 2 now" in str(error.value)
    assert "embed" not in str(error.value)
    assert "--out NEW_FOLDER" in str(error.value)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_two_sweeps_into_one_folder_are_one_too_many(tmp_path):
    with Journal(tmp_path, {}), pytest.raises(sk.errors.SweepError, match="in use") as error:
        Journal(tmp_path, {})
    assert "rows.jsonl  another sweep writes to it" in str(error.value)
    assert "Fix: wait until it has ended" in str(error.value)
    with Journal(tmp_path, {}) as journal:  # the end of a block lets go
        assert journal.rows == {}


def test_a_damaged_line_is_named(tmp_path):
    with Journal(tmp_path, {}):
        pass
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(sk.errors.SweepError, match=r"rows\.jsonl:2"):
        Journal(tmp_path, {})


def test_a_header_that_was_cut_is_written_again(tmp_path):
    with Journal(tmp_path, {"a": 1}):
        text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text[:9])
    with Journal(tmp_path, {"a": 1}):
        assert (tmp_path / "rows.jsonl").read_text() == text


def test_axes_without_a_strategy_get_their_ready_one():
    factory = ConfigFactory("", ("model=nano",))
    assert factory.select_axes(()) == ("data", "tensor")
    assert factory.unit_axes(("fsdp",)) == ("data", "tensor")
    spec = sk.MeshSpec(data=1, tensor=1, fsdp=4)
    made = factory(spec, accumulate=2, remat="full")
    assert sk.strategies.fsdp().kinds[0] in made.strategy.kinds
    assert (made.accumulate.micro_batches, made.strategy.remat) == (2, "full")
    with pytest.raises(sk.errors.ConfigError, match="Did you mean 'tensor'"):
        factory.select_axes(("tensr",))
    with pytest.raises(sk.errors.ConfigError, match="axis 'pipe'  is not one of"):
        factory.select_axes(("pipe",))  # how many micro-batches is for the config to say


def test_what_a_sweep_varies_does_not_tell_it_from_another():
    one = ConfigFactory("", ("model=nano", "mesh.tensor=2", "strategy.accumulate=4"))
    assert one.record() == ConfigFactory("", ("model=nano", "name=other")).record()
    assert one.record() != ConfigFactory("", ("model=nano", "model.num_layers=1")).record()


def test_a_target_is_compiled_in_a_child(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(_swept.__file__).parent.parent)
    found = sk.sweep(_swept.declared, out=tmp_path, axes=AXES[::-1], target="cpu:1")
    (row,) = found.ranked
    assert row.on == {"target": "cpu:1", "platform": "cpu", "device_kind": "cpu"}
    assert row.compiled["memory"]["params"] == _swept.WIDTH**2 * 4
    assert {"whole", "compile"} <= row.measured["compile_seconds"].keys()
    assert row.seconds is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axes", "data,tensr"], "Did you mean 'tensor'?"),
        (["--devices", "eight"], "--devices eight"),
        (["--remat", "ful"], "unknown policy"),
        (["configs/nano.py", "--target", "tpu:v5p:4x4x4", "--time"], "needs devices that run"),
    ],
)
def test_the_command_refuses_on_one_screen(words, message, tmp_path, capsys):
    assert main(["sweep", *words, "--out", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_hands_over_what_it_is_told(tmp_path, monkeypatch, capsys):
    given = {}
    result = sweep_module.Sweep((SweepRow(SweepCase((("data", 8),)), MEMORY, {}),), tmp_path, "one")

    def record(factory, **asked):
        given.update(asked, factory=factory)
        return result

    monkeypatch.setattr("shardkit.cli._sweep.sweep", record)
    words = ["--devices", "2,8", "--axes", "data,fsdp", "--accumulate", "1,2", "--time"]
    assert main(["sweep", *words, "--remat", "none;save:a,b", "--out", str(tmp_path)]) == 1
    assert given["devices"] == [2, 8]
    assert given["axes"] == ["data", "fsdp"]
    assert given["accumulate"] == [1, 2]
    assert given["remat"] == ["none", "save:a,b"]
    assert (given["time"], given["verify"], given["target"]) == (True, False, None)
    assert "rows.jsonl" in capsys.readouterr().out
