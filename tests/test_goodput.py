"""Goodput adds up over every life of a run, from the rows that it left behind."""

import io

import pytest
from rich.console import Console

import shardkit as sk
from shardkit.run._goodput import goodput, interruption
from shardkit.run._metrics_file import MetricsFile, read_metrics

from .test_trainer import STEPS, at_read, batch_of, interrupt, step

__all__ = ["step"]  # the fixture


def updates(first, last, begins):
    """Rows of updates of 2 s each, half a second of which waits for data."""
    return [
        {"kind": "step", "step": i, "seconds": 2.0, "data_seconds": 0.5,
         "time": begins + 2.0 * (i - first + 1)}
        for i in range(first, last + 1)
    ]  # fmt: skip


START = {"kind": "start", "began": 100.0, "seconds": {"compile": 10.0, "init": 1.0}, "time": 112.0}
SAVE = {"kind": "save", "step": 5, "seconds": 0.25, "time": 122.25}


def test_one_life_adds_up():
    rows = [START, *updates(1, 5, 112.0), SAVE]
    rows += [{"kind": "eval", "step": 5, "seconds": 3.0, "time": 125.25}]
    spent = goodput(rows, now=126.25)
    assert (spent.wall, spent.steps) == (26.25, 7.5)
    assert {name: s for name, s in spent.overhead.items() if s} == {
        "compile": 10.0, "init": 1.0, "data": 2.5, "evaluate": 3.0, "save": 0.25, "other": 2.0,
    }  # fmt: skip
    assert spent.steps + sum(spent.overhead.values()) == spent.wall
    assert spent.share == pytest.approx(7.5 / 26.25)
    assert spent.text() == (
        "goodput 28.6% of 26 s; compile 38.1%, evaluate 11.4%, data 9.5%, other 7.6%, "
        "init 3.8%, save 1.0%"
    )


def test_a_kill_costs_what_it_made_void_and_the_time_until_the_next_life():
    kept, void = [START, *updates(1, 5, 112.0), SAVE], updates(6, 8, 122.25)
    cost = interruption(kept, void, began=150.0)
    assert cost == {"lost": 6.0, "idle": 150.0 - 128.25}
    resumed = {
        "kind": "resumed", "step": 5, "began": 150.0, "time": 155.0,
        "seconds": {"compile": 2.0, "restore": 3.0, **cost},
    }  # fmt: skip
    spent = goodput([*kept, resumed, *updates(6, 10, 155.0)], now=165.0)
    assert spent.steps == 15.0
    assert (spent.overhead["lost"], spent.overhead["idle"], spent.overhead["restore"]) == (
        6.0,
        21.75,
        3.0,
    )
    assert spent.overhead["compile"] == 12.0
    assert spent.steps + sum(spent.overhead.values()) == spent.wall == 65.0
    assert interruption(kept, [], began=130.0) == {"lost": 0.0, "idle": 7.75}


def run(folder, step, *callbacks):
    out = io.StringIO()
    config = sk.TrainConfig(steps=STEPS, checkpoint_every=2, eval_every=0)
    sk.Trainer(
        step, batch_of, folder, config, callbacks=callbacks, console=Console(file=out, width=200)
    ).run()
    return out.getvalue()


def test_a_run_that_was_killed_tells_the_goodput_of_both_lives(tmp_path, step, monkeypatch):
    folder = tmp_path / "run"
    # As after SIGKILL: neither a word of why nor a sum.
    write = MetricsFile.write

    def mute(file, kind, **values):
        if kind not in ("stopped", "goodput"):
            write(file, kind, **values)

    monkeypatch.setattr(MetricsFile, "write", mute)
    with pytest.raises(KeyboardInterrupt):
        run(folder, step, at_read(5, interrupt))
    monkeypatch.undo()
    assert read_metrics(folder)[-1]["kind"] == "step"
    shown = run(folder, step)
    rows = read_metrics(folder)
    (resumed,) = [row for row in rows if row["kind"] == "resumed"]
    assert 0 < resumed["seconds"]["lost"] < 10
    assert resumed["seconds"]["idle"] >= 0
    assert resumed["seconds"]["restore"] > 0
    told = rows[-1]
    assert told["kind"] == "goodput"
    assert told["lost"] == resumed["seconds"]["lost"]
    assert told["wall"] == pytest.approx(rows[-1]["time"] - rows[0]["began"], abs=0.1)
    assert "goodput " in shown
    useful = sum(r["seconds"] - r["data_seconds"] for r in rows if r["kind"] == "step")
    assert told["useful"] == pytest.approx(useful)
    assert told["goodput"] == pytest.approx(useful / told["wall"])


def test_baselines_and_the_sample_at_the_end_are_named():
    rows = [
        {"kind": "start", "began": 0.0, "seconds": {"compile": 10.0}},
        {"kind": "step", "step": 1, "seconds": 50.0},
        {"kind": "baselines", "seconds": 25.0},
        {"kind": "sample", "seconds": 14.0},
    ]
    spent = goodput(rows, 100.0)
    assert (spent.overhead["baselines"], spent.overhead["sample"]) == (25.0, 14.0)
    assert spent.overhead["other"] == pytest.approx(1.0)
