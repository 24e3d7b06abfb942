"""What users, disks and signals do to a sweep costs no row, and is told in one message."""

import dataclasses

import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.mesh import Target
from shardkit.sweeps import ConfigFactory, Sweep, SweepCase, SweepRow, declare_case
from shardkit.sweeps import _compilers as compilers
from shardkit.sweeps import _sweep as sweep_module
from shardkit.sweeps._case_runner import (
    CaseRunner,
    is_done,
    is_verified,
    keep_measurements,
    user_figures,
)
from shardkit.sweeps._compilers import TargetCompiler
from shardkit.sweeps._factories import make_child_source
from shardkit.sweeps._journal import Journal
from shardkit.sweeps._plots import describe_sources
from shardkit.sweeps._result import COMPILED, MEASURED, MODELLED
from shardkit.sweeps._row import FAILED, ILLEGAL, MEMORY, OK, WRONG
from shardkit.sweeps._timing import SIMULATED
from shardkit.targets import UserCodeError
from shardkit.targets.__main__ import compile_for_devices

from . import _swept
from ._damages import full_disk

CODE = {"commit": "0123456789", "versions": {"jax": "0.10.2"}, "date": "2026-11-24T00:00:00Z"}


def row(status=OK, devices=2, **fields):
    case = SweepCase((("data", devices), ("fsdp", 1), ("tensor", 1)))
    return SweepRow(case, status, {"platform": "cpu", "device_kind": "cpu"}, **fields)


def compiled(**ratios):
    axes = {a: {"kind": a, "wire": 0, "minimum": 1.0, "ratio": r} for a, r in ratios.items()}
    return {"memory": {"total": 2**20}, "axes": axes, "wire": 10**7, "findings": {}}


def test_a_full_disk_costs_the_row_that_it_has_no_room_for(tmp_path):
    one, other = row(status=FAILED), row(devices=4, status=FAILED)
    with Journal(tmp_path, {}) as journal:
        journal.add(one)
        before = (tmp_path / "rows.jsonl").read_bytes()
        with (
            full_disk(len(before) + 40),
            pytest.raises(sk.errors.SweepError, match="earlier rows are kept") as error,
        ):
            journal.add(other)
        assert "rows.jsonl  File too large" in str(error.value)
        assert (tmp_path / "rows.jsonl").read_bytes() == before
        assert list(journal.rows) == [one.case.key]
        journal.add(other)
    with Journal(tmp_path, {}) as journal:
        assert list(journal.rows.values()) == [one, other]


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sk.errors.SweepError, match=r"rows\.jsonl  Not a directory"):
        sk.sweep(_swept.picky, out=tmp_path / "file" / "new", axes=["data", "tensor"], devices=2)


def test_a_file_that_is_no_text_is_refused_and_left_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(sk.errors.SweepError, match=r"rows\.jsonl  is not UTF-8 text"):
        Journal(tmp_path, {})
    assert (tmp_path / "rows.jsonl").read_bytes() == b"\xff\xfe\n"


def test_a_full_disk_leaves_the_csv_file_of_before(tmp_path):
    found = Sweep((row(status=FAILED),) * 20, tmp_path, "one")
    (tmp_path / "rows.csv").write_text("before")
    with pytest.raises(sk.errors.SweepError, match=r"rows\.csv  File too large") as error:
        with full_disk(20):
            found.write_csv()
    assert "Fix: " in str(error.value)
    assert (tmp_path / "rows.csv").read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["rows.csv"]
    assert found.write_csv().read_text() == found.to_csv()


def test_ctrl_c_says_what_is_kept_and_the_same_call_goes_on(tmp_path):
    def stop(row, done, total):
        raise KeyboardInterrupt

    asked = {"out": tmp_path, "axes": ["data", "tensor"], "devices": 4}
    with pytest.raises(KeyboardInterrupt) as stopped:
        sk.sweep(_swept.picky, **asked, on_row=stop)
    (note,) = stopped.value.__notes__
    assert note == f"1 row of 3 in {tmp_path}; the same call resumes the sweep."
    seen = []
    sk.sweep(_swept.picky, **asked, on_row=lambda row, done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + 1 + len(seen)


def test_what_code_may_have_mended_is_tried_again():
    again = {"prove": True, "timed": False}
    assert not is_done(row(ILLEGAL), **again)
    assert not is_done(row(FAILED), **again)
    assert not is_done(row(WRONG), **again)
    assert is_done(row(WRONG), prove=False, timed=True)  # nobody would see that it is mended
    assert is_done(row(MEMORY), **again)


def test_a_proof_holds_for_the_code_that_it_was_made_with():
    proved = row(verified={"ok": True}, provenance=CODE, measured={"warm_up_seconds": 1.0})
    assert is_verified(proved, CODE)
    assert not is_verified(dataclasses.replace(proved, verified={"ok": None}), CODE)
    assert not is_verified(proved, CODE | {"commit": "other"})
    for unknown in ("0123456789-dirty", None):
        said = CODE | {"commit": unknown}
        assert not is_verified(dataclasses.replace(proved, provenance=said), said)
    new = row(provenance=CODE)
    assert keep_measurements(new, proved).verified == {"ok": True}
    assert keep_measurements(new, proved).measured == {"warm_up_seconds": 1.0}
    assert keep_measurements(new, dataclasses.replace(proved, status=WRONG)) == new
    other = row(provenance=CODE | {"versions": {"jax": "0.12"}})
    assert keep_measurements(other, proved) == other


def test_a_model_of_the_user_that_fails_costs_no_row():
    case = SweepCase((("data", 2),))
    assert user_figures(lambda case: case.devices, case) == {"memory": 2.0}
    said = user_figures(lambda case: {}["bytes"], case)
    assert said == {"not_modelled": "estimate raised KeyError: 'bytes'"}


def test_what_tells_sweeps_apart_must_be_plain(tmp_path):
    with pytest.raises(sk.errors.SweepError, match="must be plain values") as error:
        sk.sweep(_swept.declared, out=tmp_path / "new", devices=1, record={"data": {1, 2}})
    assert "set is not JSON serializable" in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:factory", "there is no module 'no_such_module'"),
        ("tests._swept:declard", "has no function 'declard'. Did you mean 'declared'?"),
        ("tests._swept:unlike", "cannot be called: got an unexpected keyword argument"),
        (_swept.unlike, "tests._swept:unlike  cannot be called: got an unexpected keyword"),
        (7, "7  is not a function, but int"),
        ("broken_factory:factory", "its module raised ZeroDivisionError: division"),
    ],
)
def test_what_is_no_factory_is_refused_before_anything_is_written(
    factory, message, tmp_path, monkeypatch
):
    (tmp_path / "broken_factory.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(sk.errors.ConfigError) as error:
        sk.sweep(factory, out=tmp_path / "new", devices=1)
    assert message in str(error.value)
    assert "Fix: " in str(error.value)
    assert not (tmp_path / "new").exists()


def test_all_that_is_declared_is_compiled_for_a_target():
    declared = _swept.declared(sk.MeshSpec(data=2, tensor=4), accumulate=1, remat="none")
    assert declared.on_nonfinite == "stop"
    made = compile_for_devices(declared, sk.MeshSpec(data=2, tensor=4), Target.parse("cpu:8")).spec
    for field in ("on_nonfinite", "mode", "deterministic", "debug", "on_retrace", "strategy"):
        assert getattr(made, field) == getattr(declared, field)


def absent(factory):
    """Tries one case for a target, with whatever stands where the child would be."""
    case = SweepCase((("data", 1), ("tensor", 2)))
    compiler = TargetCompiler(factory, lambda case: make_child_source(factory, case), "cpu:2", 60.0)
    return CaseRunner(compiler).run_case(case)[0]


def test_what_a_factory_raises_for_a_target_is_its_own_and_starts_no_child(monkeypatch):
    monkeypatch.setattr(compilers, "compile_for", None)
    raised = absent(_swept.picky)
    assert (raised.status, raised.reason) == (FAILED, "KeyError: 'no such head'")
    none = absent(lambda mesh, **asked: None)
    assert (none.status, "returned NoneType; a compile elsewhere" in none.reason) == (ILLEGAL, True)
    deaf = absent(lambda mesh, **asked: _swept.deaf(mesh, accumulate=1, remat="full"))
    assert "is 'none' in the case, the step has 'full'" in deaf.reason


def test_what_users_code_raises_in_a_child_is_the_reason_of_its_row(monkeypatch):
    def fails(source, target, timeout):
        raise UserCodeError("The code of mine raised an error.\nTraceback", "KeyError: 'mine'")

    monkeypatch.setattr(compilers, "compile_for", fails)
    found = absent(_swept.declared)
    assert (found.status, found.reason) == (FAILED, "KeyError: 'mine'")
    assert "Traceback" in found.error


def test_a_config_that_changes_under_a_sweep_changes_no_row(tmp_path):
    path = tmp_path / "mine.py"
    text = "import shardkit as sk\ndef config():\n    return sk.Config(name='mine')"
    path.write_text(text)
    factory = ConfigFactory(str(path), ("model=nano",))
    case = SweepCase((("data", 1), ("tensor", 1)))
    source = make_child_source(factory, case).to_request()["arguments"]
    assert declare_case(**source)[1] == sk.MeshSpec(data=1, tensor=1)
    path.write_text(text.replace("name=", "strategy=sk.strategies.data(), name="))
    with pytest.raises(sk.errors.SweepError, match=r"mine\.py  was changed while the sweep ran"):
        declare_case(**source)


def test_the_command_takes_a_function_by_its_name(tmp_path, monkeypatch, capsys):
    given, offered = {}, []

    def record(factory, **asked):
        given.update(asked, factory=factory)
        return sweep_module.Sweep((row(MEMORY),), tmp_path, "one")

    monkeypatch.setattr("shardkit.cli._sweep.sweep", record)
    monkeypatch.setattr("shardkit.cli._sweep.offer_devices", offered.append)
    assert main(["sweep", "tests._swept:declared", "--devices", "2,4"]) == 1
    assert given["factory"] is _swept.declared
    assert (given["devices"], offered, given["target"]) == ([2, 4], [4], None)
    assert str(given["out"]) == "sweeps/declared"
    assert main(["sweep", "tests._swept:declared", "--target", "tpu:v5p:2x2x1"]) == 1
    assert (given["target"], given["devices"], len(offered)) == ("tpu:v5p:2x2x1", None, 1)
    assert main(["sweep", "tests._swept:declared", "--set", "model=nano"]) == 2
    assert "is a function, not a config" in capsys.readouterr().err


def test_no_figure_of_a_table_is_cut_off(tmp_path):
    ratios = {"data": 1.11, "fsdp": 1.22, "tensor": 1.33}
    timed = {"step_seconds": {"median": 0.0771, "low": 0.07, "high": 0.08, "samples": 12}}
    made = [
        dataclasses.replace(
            row(compiled=compiled(**ratios), measured=timed | {"where": SIMULATED}),
            case=SweepCase(tuple((axis, n) for axis in ratios)),
        )
        for n in (2, 16)
    ]
    for one in made:
        one.measured["compile_seconds"] = {"whole": 12.7}
    text = " ".join(str(Sweep(tuple(made), tmp_path, "one")).split())
    for ratio in ("data 1.11", "fsdp 1.22", "tensor 1.33"):
        assert text.count(ratio) == 2


def test_where_times_are_from_is_said_once_with_the_rows_of_each():
    timed = {"step_seconds": {"median": 0.1, "low": 0.1, "high": 0.1, "samples": 6}}
    timed |= {"compile_seconds": {"whole": 1.0}}
    one = row(devices=1, compiled=compiled(), measured=timed | {"where": "measured on cpu"})
    two = row(devices=2, compiled=compiled(), measured=timed | {"where": SIMULATED})
    text = " ".join(str(Sweep((one, two), None, "one")).split())
    assert text.count("Step: median") == 1
    assert f"measured on cpu (1 row); {SIMULATED} (1 row)." in text
    for by, said in {
        MEASURED: f"measured on cpu (1 row); {SIMULATED} (1 row); ",
        MODELLED: "modelled for cpu devices, simulated; ",
        COMPILED: "compiled for cpu devices, simulated; ",
    }.items():
        assert describe_sources([one, two], by).startswith(said)
