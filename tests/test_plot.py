"""What is drawn of runs: all lives as one curve; and a clear word where nothing can be drawn."""

import importlib.util
import json
import math

import numpy as np
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.run import _plot, plot_runs
from shardkit.run._history import Curve, read_histories


def rows(first, last, loss=lambda i: 3.0 / i, unit="tokens"):
    return [
        {"kind": "step", "step": i, "loss": loss(i), f"{unit}_per_second": 100.0 + i}
        for i in range(first, last + 1)
    ]


START = {"kind": "start", "device": {"simulated": True}}


def write(folder, *rows, tail=""):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


@pytest.fixture
def run(tmp_path):
    """Killed after update 6 and gone on with from 4; its evaluation in bits, one loss infinite."""
    validation = {"kind": "eval", "step": 4, "bits_per_byte": 2.0, "bytes": 10}
    later = rows(5, 8, lambda i: None if i == 7 else 1.0 / i)
    return write(
        tmp_path / "runs" / "first",
        START, *rows(1, 4), validation, *rows(5, 6), {"kind": "resumed", "step": 4}, *later,
        tail='{"kind": "step", "st',
    )  # fmt: skip


def test_all_lives_of_a_run_are_one_curve(run):
    (history,) = read_histories([run])
    loss = history.column("loss")
    assert loss.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert loss.values[:6] == [3.0, 1.5, 1.0, 0.75, 0.2, 1 / 6]
    assert math.isnan(loss.values[6])
    assert history.evaluations == Curve([4], [pytest.approx(2.0 * math.log(2))])
    assert (history.unit, history.resumed, history.simulated) == ("tokens", [4], True)
    # Updates 1 and 5 warm a process up.
    assert history.speed == Curve([2, 3, 4, 6, 7, 8], [102.0, 103.0, 104.0, 106.0, 107.0, 108.0])
    assert history.note == "first: 1 broken line skipped (14)"
    assert read_histories([run / "metrics.jsonl"]) == [history]


def test_runs_are_told_apart_by_name_or_where_that_is_one_by_folder(tmp_path, run):
    other = write(tmp_path / "other" / "first", START, *rows(1, 3))
    second = write(tmp_path / "runs" / "second", START, *rows(1, 3))
    assert [h.name for h in read_histories([run, second])] == ["first", "second"]
    assert [h.name for h in read_histories([run, other])] == [str(run), str(other)]
    assert len(read_histories([run, run])) == 1


def test_losses_of_tokens_are_not_mixed_up_with_bits_per_byte(tmp_path):
    told = {"kind": "eval", "step": 1, "bits_per_byte": 2.0, "bits_per_token": 9.0, "tokens": 7}
    own = {"kind": "eval", "step": 2, "loss": 1.25}
    (history,) = read_histories([write(tmp_path / "run", START, *rows(1, 3), told, own)])
    assert history.evaluations.values == [pytest.approx(9.0 * math.log(2)), 1.25]


def texts(figure):
    first, second = figure.axes
    legend = [text.get_text() for text in first.get_legend().get_texts()]
    return legend, first.get_ylabel(), second.get_ylabel(), second.get_xlabel()


def test_the_picture_names_runs_units_and_marks(tmp_path, run):
    many = write(tmp_path / "runs" / "many", START, *rows(1, 200, unit="rows"))
    figure = _plot._draw_figure(read_histories([run, many]))
    assert texts(figure) == (
        ["first", "many", "validation", "resumed"],
        "loss (nats)",
        "tokens/s or rows/s\n(simulated CPU devices)",
        "step",
    )
    # Many updates: each faintly, and their running median.
    drawn = [line for line in figure.axes[0].lines if line.get_color() == "C1"]
    assert [line.get_alpha() for line in drawn if len(line.get_xdata()) == 200] == [0.25, None]
    alone = _plot._draw_figure(read_histories([many]))
    assert texts(alone)[0] == ["many"]


def test_the_median_is_not_bent_by_one_outlier_and_leaves_a_gap_where_there_is_no_number():
    assert list(_plot._running_median([1.0] * 30 + [50.0] + [1.0] * 30)) == [1.0] * 61
    assert list(_plot._running_median([1.0] * 60 + [50.0])) == [1.0] * 61
    assert np.isnan(_plot._running_median([1.0] * 30 + [math.nan] + [1.0] * 30)).sum() == 5


def test_every_kind_of_file_is_written(tmp_path, run, capsys):
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!doctype html>"}
    for suffix, start in starts.items():
        out = tmp_path / f"plot{suffix}"
        assert main(["plot", str(run), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(start)
        assert capsys.readouterr().out == (f"first: 1 broken line skipped (14)\n{out}: 1 run\n")
    page = (tmp_path / "plot.html").read_text()
    assert page.count("<svg") == 1
    assert "1 broken line skipped" in page
    assert "http" not in page.split("</h1>")[0]


def test_everything_that_is_no_run_is_named_at_once(tmp_path, run, capsys):
    empty = write(tmp_path / "runs" / "empty", START)
    photos = tmp_path / "runs" / "photos"
    photos.mkdir()
    (note := tmp_path / "runs" / "note.txt").write_text("not a run")
    words = [str(tmp_path / "runs" / "frist"), *map(str, (empty, photos, note, run))]
    out = tmp_path / "plot.png"
    assert main(["plot", *words, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "4 runs cannot be plotted." in shown
    assert f"does not exist. Did you mean '{run}'?" in shown
    assert "has finished no update yet: metrics.jsonl has 1 row." in shown
    assert "has no metrics.jsonl, so it is not a run folder." in shown
    assert "is a file, not the folder of a run." in shown
    assert f"shardkit plot {empty} {run}" in shown
    # What has told of nothing is not offered in its own place.
    assert f"shardkit plot {run}" in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "why", "fix"),
    [
        ("plot.jpg", "has the suffix '.jpg'; known: .png, .svg, .html.", "plot.png"),
        ("plot", "has no suffix; known: .png, .svg, .html.", "plot.png"),
        ("no/such/plot.svg", "No such file or directory: there is no folder", "plot.png"),
    ],
)
def test_a_picture_that_cannot_be_written_says_why(name, why, fix, tmp_path, run):
    with pytest.raises(sk.errors.ConfigError) as error:
        plot_runs([run], tmp_path / name)
    assert str(error.value).startswith(f"The figure cannot be saved.\n  {tmp_path / name}  {why}")
    assert "Fix: --out " in str(error.value)
    assert str(error.value).endswith(fix)


def test_a_missing_package_is_named_with_its_command(tmp_path, run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sk.errors.ConfigError, match=r"Fix: pip install 'shardkit\[plot\]'"):
        plot_runs([run], tmp_path / "plot.png")
