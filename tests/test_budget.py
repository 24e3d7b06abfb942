"""Budgets, and the report they are held against: its text and its JSON."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.errors import BudgetError, ReportError
from shardkit.parallel import strategies
from shardkit.report import FINDINGS, Budget, Declarations, Flops, Program, Report
from shardkit.report.communication._reductions import reductions_per_step
from shardkit.report.findings._findings import FROM_LEDGER

from ._programs import BATCH, WEIGHTS, WIDTH, loss, make_mesh, program, recorded, rows, sgd, weights

MESH = {"data": 8}
KINDS = strategies.data().kinds


@pytest.fixture(scope="module")
def made():
    parts = {"params": weights(), "batch": rows(P("data"))}
    declared = Declarations(kinds=KINDS)
    step = program(sgd, make_mesh(**MESH), donate=("params",), whole=("params",), **parts)
    return dataclasses.replace(step, declared=declared)


@pytest.fixture(scope="module")
def report(made):
    return Report.of(made)


@pytest.fixture(scope="module")
def naive():
    def step(params, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    micro = rows(P(None, "data"), 4, BATCH, WIDTH)
    return Report.of(program(step, make_mesh(**MESH), params=weights(), batch=micro))


WIRE = 2 * 7 * (WEIGHTS + 4) // 8


def test_a_sound_step_keeps_its_budget(report):
    report.check(
        Budget(
            replicated_bytes=0,
            reductions_per_step={"data": 1},
            involuntary_remat=0,
            wire_bytes={"data": WIRE, "all-gather": 0, ("data", "all-reduce"): WIRE},
            collectives={"all-reduce": 4},
            memory_bytes=report.memory.total,
            compiles=1,
            findings={"resharding": 0},
        )
    )
    report.check(Budget())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(wire_bytes={"data": WIRE - 1}), "['data']  at most 10.51 KiB, found 10.51"),
        (Budget(wire_bytes={("data", "all_reduce"): 0}), "all-reduce over data of f32 2.00 KiB ×3"),
        (Budget(collectives={"all-reduce": 3}), "collectives['all-reduce']  at most 3, found 4"),
        (Budget(memory_bytes=100), "memory_bytes  at most 100 B, found"),
        (Budget(compiles=0), "compiles  at most 0, found 1"),
        (Budget(reductions_per_step={"data": 0.5}), "['data']  at most 0.5, found 1"),
    ],
)  # fmt: skip
def test_what_exceeds_a_budget_is_named(report, budget, message):
    with pytest.raises(BudgetError) as raised:
        report.check(budget)
    assert "1 budget exceeded by the step compiled for mesh (data=8)." in str(raised.value)
    assert message in str(raised.value)


def test_all_of_a_budget_is_checked_at_once(naive):
    with pytest.raises(BudgetError) as raised:
        naive.check(
            Budget(
                replicated_bytes=0,
                reductions_per_step={"data": 1},
                findings={"reduction_in_loop": 0},
            )
        )
    text = str(raised.value)
    assert text.startswith("3 budgets exceeded by the step compiled for mesh (data=8).")
    assert "replicated_bytes               at most 0 B, found 6.00 KiB" in text
    assert "params/down 3.00 KiB" in text
    assert "reductions_per_step['data']    at most 1, found 4" in text
    assert "×12 in mlp (backward)" in text
    assert """  - sk.Accumulate(k, reduce="end")""" in text


def test_one_parameter_too_many_is_found(report):
    (row, *_) = report.ledger.where(phase="backward")
    again = dataclasses.replace(row, trips=1)
    more = dataclasses.replace(report.ledger, rows=(*report.ledger.rows, again))
    leaves = program(sgd, make_mesh(**MESH), params=weights(), batch=rows(P("data"))).leaves
    assert reductions_per_step(report.ledger, "data", leaves, MESH) == 1
    assert reductions_per_step(more, "data", leaves, MESH) == pytest.approx(4 / 3)


def test_a_reduction_in_a_branch_counts_as_often_as_it_is_taken(report):
    """As in the ticks of a pipeline, of which a stage goes backward in some."""
    leaves = program(sgd, make_mesh(**MESH), params=weights(), batch=rows(P("data"))).leaves
    third = tuple(dataclasses.replace(row, taken=1 / 3) for row in report.ledger.rows)
    ledger = dataclasses.replace(report.ledger, rows=third)
    assert reductions_per_step(ledger, "data", leaves, MESH) == pytest.approx(1 / 3)


def test_what_cannot_be_told_keeps_no_budget(made, report):
    cached = dataclasses.replace(report, messages_complete=False)
    with pytest.raises(BudgetError, match="came from the compilation cache"):
        cached.check(Budget(involuntary_remat=0))
    cut = Report.of(dataclasses.replace(made, hlo=made.hlo[:-3]))
    with pytest.raises(BudgetError, match="the ledger is incomplete: the text ends inside"):
        cut.check(Budget(wire_bytes={"data": 10**9}))
    with pytest.raises(BudgetError, match="memory_bytes  the compiler does not report"):
        Report.of(Program(made.hlo, made.mesh, "cpu")).check(Budget(memory_bytes=10**9))
    with pytest.raises(BudgetError, match="but the batch is not split over it"):
        Report.of(Program(made.hlo, made.mesh, "cpu")).check(
            Budget(reductions_per_step={"data": 1})
        )


def test_findings_that_a_gap_may_hide_keep_no_budget(report):
    cached = dataclasses.replace(report, messages_complete=False)
    with pytest.raises(BudgetError, match=r"findings\['involuntary_remat'\]  unknown"):
        cached.check(Budget(findings={"involuntary_remat": 0, "unexplained_collective": 0}))
    cut = dataclasses.replace(report, ledger=dataclasses.replace(report.ledger, problems=("gap",)))
    with pytest.raises(BudgetError, match="the ledger is incomplete: gap") as told:
        cut.check(Budget(findings=dict.fromkeys(FINDINGS, 0)))
    assert str(told.value).startswith(f"{len(FROM_LEDGER)} budgets exceeded")
    cut.check(Budget(findings={"replicated": 0, "involuntary_remat": 0}))


def test_a_budget_is_made_of_numbers():
    with pytest.raises(ReportError) as raised:
        Budget(memory_bytes="1GB", wire_bytes={"data": None})  # pyright: ignore
    assert str(raised.value) == (
        "The budget cannot be read.\n"
        "  wire_bytes['data']=None  is a NoneType, not a number\n"
        "  memory_bytes='1GB'       is a str, not a number\n"
        "Fix: sk.Budget(memory_bytes=16 * 2**30, wire_bytes={'data': 2**20}, compiles=1)"
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"wire_bytes": 5}, r"wire_bytes=5 [^\n]*\nFix:\n  - wire_bytes=\{KEY: 5\}"),
        ({"wire_bytes": {None: 1}}, r"\[None\]  a key is an axis, a kind, or \(axis, kind\)"),
        ({"collectives": {("a", "b", "c"): 1}}, r"a key is an axis, a kind, or \(axis, kind\)"),
        ({"wire_bytes": {("data", "tx"): 1}}, "'tx' is not a kind"),
        ({"wire_bytes": {("data", "allreduce"): 1}}, r"not a kind .*Did you mean 'all-reduce'\?"),
        ({"reductions_per_step": {("data", "all-reduce"): 1}}, "a key is one name"),
        ({"involuntary_remat": True}, "involuntary_remat=True  is a bool, not a number"),
        ({"memory_bytes": float("nan")}, "memory_bytes=nan  is not a number of at least 0"),
        ({"reductions_per_step": {"data": float("nan")}}, "=nan  is not a number of at least 0"),
        ({"memory_bytes": -5}, "memory_bytes=-5  is not a number of at least 0"),
    ],
)
def test_a_budget_in_a_form_that_holds_nothing_is_refused(parts, message):
    with pytest.raises(ReportError, match=message):
        Budget(**parts)


def test_only_a_budget_is_a_budget(report):
    with pytest.raises(ReportError, match="takes a Budget, not a dict"):
        report.check({"memory_bytes": 1})


def test_a_loop_that_never_runs_executes_nothing(report):
    rows = tuple(dataclasses.replace(row, trips=0, wire_bytes=0) for row in report.ledger)
    idle = dataclasses.replace(report, ledger=dataclasses.replace(report.ledger, rows=rows))
    idle.check(Budget(collectives={"data": 0}))


def test_unknown_names_are_errors(report):
    with pytest.raises(ReportError, match="no axis 'dat'"):
        report.check(Budget(wire_bytes={"dat": 1}))
    with pytest.raises(ReportError, match="Did you mean 'resharding'"):
        report.check(Budget(findings={"reshardings": 1}))


def test_json_round_trip(report, naive):
    for one in (report, naive):
        again = Report.from_json(one.to_json())
        assert again == one
        assert str(again) == str(one)
    fields = json.loads(report.to_json())
    assert (fields["schema"], fields["version"]) == ("shardkit.report", 2)
    assert fields["ledger"]["rows"][0]["axes"] == ["data"]


def test_fields_of_a_newer_report_are_passed_over(report):
    fields = json.loads(report.to_json()) | {"newer": 1}
    fields["ledger"]["rows"][0]["newer"] = [1]
    fields["memory"]["newer"] = None
    assert Report.from_json(json.dumps(fields)) == report


@pytest.mark.parametrize("name", ["version", "mesh", "ledger", "memory", "platform", "flops"])
def test_a_field_that_is_missing_is_named(report, name):
    fields = json.loads(report.to_json())
    del fields[name]
    with pytest.raises(ReportError, match=f"lacks the field '{name}'"):
        Report.from_json(json.dumps(fields))


def test_a_field_of_a_row_that_is_missing_is_named(report):
    fields = json.loads(report.to_json())
    del fields["ledger"]["rows"][0]["kind"]
    with pytest.raises(ReportError, match="lacks the field 'kind' of a LedgerRow"):
        Report.from_json(json.dumps(fields))
    with pytest.raises(ReportError, match="not as it was written"):
        Report.from_json(report.to_json().replace('"mesh": [', '"mesh": [7,', 1))
    del fields["ledger"]["rows"][0]
    for name, value in (("params", "many"), ("temp", [3]), ("rest", None)):
        wrong = {**fields, "memory": {**fields["memory"], name: value}}
        said = re.escape(f"not as it was written: {name!r} of a Memory is {value!r}. Save one")
        with pytest.raises(ReportError, match=said):
            Report.from_json(json.dumps(wrong))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "This is not a report: Expecting value"),
        ("[]", "This is not a report of shardkit"),
        ('{"schema": "shardkit.report", "version": 99}', "has version 99; this shardkit reads 2"),
        ('{"schema": "shardkit.report", "version": 1}', "has version 1; this shardkit reads 2"),
    ],
)
def test_what_is_no_report_is_refused(text, message):
    with pytest.raises(ReportError, match=message):
        Report.from_json(text)


def test_text_fits_and_says_what_matters(report, naive):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "Findings: none." in text
    assert "data  10.51 KiB     0 B  10.50 KiB (data)   1.00  1" in text
    assert str(naive).index("reduction_in_loop") < str(naive).index("Sent per step")


def test_an_incomplete_program_says_so_first(made):
    cut = Report.of(dataclasses.replace(made, hlo=made.hlo[:-3]))
    assert str(cut).splitlines()[1].startswith("INCOMPLETE: the text ends inside")
    assert "Sent per step: at least" in str(cut)
    assert "≥ " in str(cut).partition("Sent per step")[2].partition("Memory")[0]
    counted = Flops(8, 0, {("mlp", "forward"): 8}, ("a loop",))
    assert "all devices: at least 8 model" in str(dataclasses.replace(cut, flops=counted))
    unread = Report.of(dataclasses.replace(made, log_complete=False))
    assert "involuntary remats may be missing" in str(unread)


def test_text_of_a_large_program_fits():
    made = Program(recorded("tpu_v5p_fsdp_tensor"), (("fsdp", 4), ("tensor", 4)), "tpu", "TPU v5")
    text = str(Report.of(made))
    assert max(map(len, text.splitlines())) <= 100
    # A fifth of what goes over both axes; four devices along fsdp send 3/4 of it, then 4 along
    # tensor 3/4 of a quarter.
    tensor = 6_742_204_416 + 778_567_680 // 5
    assert f"tensor  {tensor / 2**30:.2f} GiB" in text
    assert "over several axes, divided among these: fsdp, tensor 742 MiB." in text
    assert "and 71 more collectives" in text
