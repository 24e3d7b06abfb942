"""Tick tables: legal, as long as the papers say, and as hungry; and tables that are not."""

import dataclasses
import fractions

import pytest

from shardkit.parallel.pipeline._schedule import (
    SCHEDULES,
    Action,
    PassType,
    forward_only,
    schedule,
)
from shardkit.parallel.pipeline._tick_program import tick_program

SIZES = [(2, 2), (2, 8), (3, 6), (4, 4), (4, 16), (8, 16)]
TABLES = {
    (name, p, m, v): schedule(name, stages=p, micro_batches=m, virtual_stages=v)
    for name in SCHEDULES
    for p, m in SIZES
    for v in ((2, 3) if name == "interleaved" else (1,))
}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=map(str, TABLES))


@each_table
def test_every_pass_is_made_once_and_after_what_it_needs(table):
    assert table.violations() == []


@each_table
def test_bubbles_are_the_papers(table):
    p, m, v = table.stages, table.micro_batches, table.virtual_stages
    work = 3 * m if table.splits_backward else 2 * m * v
    # 2(p−1) ticks wait for the first and the last micro-batch; ZB-H1 fills all but p−1 of them.
    idle = p - 1 if table.splits_backward else 2 * (p - 1)
    assert len(table.ticks) == work + idle
    assert table.bubble == fractions.Fraction(idle, work + idle)


@each_table
def test_live_activations_are_the_papers(table):
    p, m, v = table.stages, table.micro_batches, table.virtual_stages
    live = table.live()
    if table.name == "gpipe":
        assert live == (m,) * p
    if table.name == "1f1b":
        assert live == tuple(min(m, p - s) for s in range(p))
    if table.name == "zero_bubble":
        assert live == (min(m, p),) * p
    if table.name == "interleaved":
        # 1 + (p−1)/(pv) times the p activations of 1F1B's first stage, in parts of 1/v each.
        bound = fractions.Fraction(p * v) * (1 + fractions.Fraction(p - 1, p * v))
        assert live[0] == min(m * v, bound if m > p else m * v)
        assert max(live) == live[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_slots_do_not_grow_with_micro_batches_but_for_gpipe(name):
    v = 2 if name == "interleaved" else 1
    few, many = (
        tick_program(schedule(name, stages=4, micro_batches=m, virtual_stages=v)).slots
        for m in (8, 32)
    )
    assert many == (33 if name == "gpipe" else few)
    assert few == {"gpipe": 9, "1f1b": 5, "interleaved": 13, "zero_bubble": 8}[name]


@pytest.mark.parametrize(("name", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_evaluations_go_forward_alone(name, v):
    table = forward_only(name, stages=4, micro_batches=6, virtual_stages=v)
    assert table.violations() == []
    assert not table.trains
    assert tick_program(table).slots == 1


@each_table
def test_exchanges_bring_each_message_to_its_slot_before_it_is_read(table):
    """Plays the table on the slots and follows what is in them."""
    plan = tick_program(table)
    columns = {name: column.tolist() for name, column in plan.columns.items()}
    held = [["?"] * (plan.slots + 1) for _ in range(table.stages)]
    last = table.stages * table.virtual_stages - 1
    for t, row in enumerate(table.ticks):
        said = [None] * table.stages
        for s, work in enumerate(row):
            if work is None:
                continue
            part, own = table.part(s, work.chunk), held[s]
            if part == 0 and work.pass_type is PassType.FORWARD:
                own[columns["input"][t][s]] = ("input", work.micro, 0)
            if part == last and work.pass_type is PassType.INPUT:
                own[columns["grad"][t][s]] = ("grad", work.micro, part)
            assert own[columns["input"][t][s]] == ("input", work.micro, part)
            if work.pass_type is not PassType.FORWARD and (
                part < last or work.pass_type is PassType.WEIGHT
            ):
                assert own[columns["grad"][t][s]] == ("grad", work.micro, part)
            if work.pass_type is not PassType.WEIGHT:
                back = work.pass_type is not PassType.FORWARD
                said[s] = (
                    ("grad", work.micro, part - 1) if back else ("input", work.micro, part + 1)
                )
        for channel, pairs in enumerate(plan.exchanges[plan.exchange[t]]):
            for src, dst in pairs:
                held[dst][columns[f"arrival{channel}"][t][dst]] = said[src]


def test_a_tick_of_1f1b_needs_one_message_from_each_stage():
    plan = tick_program(schedule("1f1b", stages=4, micro_batches=8))
    assert [len(exchange) for exchange in plan.exchanges] == [1, 1, 0]
    assert plan.exchanges[0] != plan.exchanges[1]


def test_illegal_tables_are_named():
    table = schedule("1f1b", stages=2, micro_batches=2)
    rows = [list(row) for row in table.ticks]
    rows[1][1], rows[2][1] = rows[2][1], rows[1][1]
    swapped = dataclasses.replace(table, ticks=tuple(map(tuple, rows)))
    assert swapped.violations() == ["B0 of stage 1 in tick 1 is before F0 of stage 1"]
    rows[1][1] = None
    assert (
        "B0 of stage 1 is missing"
        in dataclasses.replace(table, ticks=tuple(map(tuple, rows))).violations()
    )
    unknown = (Action(PassType.FORWARD, 3), None)
    wrong = dataclasses.replace(table, ticks=(unknown, *table.ticks))
    assert "F3 of stage 0 is unknown" in wrong.violations()
    twice = dataclasses.replace(table, ticks=(*table.ticks, table.ticks[0]))
    assert twice.violations()[0] == "1 passes are repeated"


def test_tables_are_drawn():
    assert str(schedule("zero_bubble", stages=2, micro_batches=2)).splitlines() == [
        "stage 0  F0 F1 .. B0 W0 B1 W1",
        "stage 1  .. F0 B0 F1 B1 W0 W1",
    ]
    first = str(TABLES["interleaved", 2, 2, 2]).splitlines()[0]
    assert first == "stage 0  F0a F1a F0b F1b ... ... B0b B1b B0a B1a"
