"""The command line is closed, and what goes wrong fits a screen."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardkit._core.errors import StepError
from shardkit.checkpoint import Checkpointer
from shardkit.cli import _main as entry
from shardkit.cli import _report, main
from shardkit.cli._command import Command

ROOT = Path(__file__).parent.parent
SHARED = {"-h", "--help", "--set", "--debug"}
# Every option of every command. A new one is added here too, by someone who means it.
OPTIONS = {
    "train": SHARED
    | {"--steps", "--lr", "--batch-size", "--seq-len", "--mesh", "--strategy", "--devices"}
    | {"--seed", "--name", "--profile"},
    "config": SHARED,
    "init": {"-h", "--help", "--debug"},
    "completion": {"-h", "--help", "--debug"},
    "verify": SHARED | {"--mesh", "--steps", "--mutations"},
    "replay": {"-h", "--help", "--debug"},
    "sweep": SHARED
    | {"--devices", "--axes", "--accumulate", "--remat", "--target", "--verify", "--time"}
    | {"--repeats", "--out", "--plots", "--timeout"},
    "checkpoint": {"-h", "--help", "--debug", "--values"},
    "plot": {"-h", "--help", "--debug", "--out"},
    "plan": SHARED | {"--target", "--global-batch", "--compile", "--overlap", "--plot", "--json"},
    "report": SHARED
    | {"--why", "--target", "--chip", "--json", "--html", "--trace", "--profile", "--timeout"}
    | {"--mesh"},
    "convert": {
        "-h",
        "--help",
        "--debug",
        "--target-mesh",
        "--like",
        "--vocab-padding",
        "--ignore",
    },
    "hardware": {"-h", "--help", "--debug", "--config", "--measure"},
    "launch": {"-h", "--help", "--debug", "-n", "--devices"},
    "shards": {"-h", "--help", "--debug"},
    "tokenize": {"-h", "--help", "--debug", "--tokenizer", "--tokens"},
}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trian nano", "Did you mean 'train'?"),
        ("train nano --step 3", "shardkit train: error: unrecognized arguments: --step 3. Did"),
        ("report nano --whyy", "Did you mean '--why'?"),
        ("completion zhs", "Did you mean 'zsh'?"),
        ("train nano other", "unrecognized arguments: other\n"),
    ],
)
def test_a_mistyped_command_or_option_names_the_closest(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(words.split())
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def options(parser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def test_the_command_line_is_closed():
    root = entry.parser()
    (below,) = (a for a in root._actions if isinstance(a.choices, dict))
    assert options(root) == {"-h", "--help", "--version"}
    assert {name: options(sub) for name, sub in below.choices.items()} == OPTIONS


def test_an_option_that_is_not_listed_would_be_seen(monkeypatch):
    model_state = Command("model_state", "one more", lambda arguments: 0)
    monkeypatch.setattr(entry, "COMMANDS", (*entry.COMMANDS, model_state))
    with pytest.raises(AssertionError):
        test_the_command_line_is_closed()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.stepz=3"], "Did you mean 'steps'?"),
        (["--set", "train.seed=abc"], "expected int, got 'abc'."),
        (["no/such.py"], "There is no such config."),
        (["--set", "data.path=/no/such"], "there is no such file or folder."),
        (["--set", "data.seq_len=100000000"], "is longer than all its"),
        (["--set", "mesh.tensor=3"], "The mesh does not fit 8 devices."),
        (["--set", "devices=tpu:v5p:4x4x4"], "are devices of a compile target"),
        (["--set", "devices=cpu:many"], "No such target."),
        (["--set", "strategy.remat=ful"], "unknown policy"),
        (["--set", "train.loggers=tensorbord"], "Did you mean 'tensorboard'?"),
        (["--profile", "390:410"], "ends after the last update, train.steps=400."),
        (["--profile", "15:10"], "ends before it begins: 10 < 15."),
        (["--profile", "0:3"], "begins before the first update, which is 1."),
        (["--profile", "ten"], "is not a range of updates first:last."),
    ],
)
def test_a_users_mistake_is_one_screen_and_exit_code_2(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Fix:" in shown or "Did you mean" in shown or "expected" in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 24
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such.json"], "does not exist"),
        (["no/such.json", "no/other.json"], "does not exist"),
        (["a.json", "b.json", "--target", "cpu:8"], "do not apply to a.json and b.json."),
        (["mine:step"], "is a function, which declares no devices"),
        (["mine:step", "--set", "a=1"], "mine:step is a function, not a config"),
        (["--target", "tpu:v9:2x2"], "unknown chip 'v9'; known: v4, v5e, v5p, v6e, tpu7x."),
        (["a.json", "--target", "cpu:8"], "do not apply to a.json."),
        (["mine:step", "--target", "cpu:2", "--json", "/"], "--json /  is a folder, not a file"),
        (
            ["mine:step", "--html", "/dev/null/x.html"],
            "cannot be written: /dev/null is not a folder",
        ),
        (["a.json", "--set", "a=1"], "--set a=1  cannot change a saved report"),
        (["mine:step", "--target", "cpu:2", "--trace", "/"], "--trace /  is a folder, not a file"),
        (["mine:step", "--target", "cpu:2", "--trace", "t.json"], "cpu:2 has none: simulated"),
        (["mine:step", "--target", "cpu:2", "--profile", "gone"], "gone  does not exist"),
        (["a.json", "b.json", "--trace", "t.json"], "is of one report, not of how two differ"),
    ],
)
def test_what_cannot_be_explained_is_refused_before_anything_is_compiled(words, message, capsys):
    assert main(["report", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Fix:" in shown


def test_a_long_compile_is_told_of_once_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    def compiling(source, target, *, chip, timeout, progress):
        for seconds in (0, 30, 61, 62, 119, 121):
            progress(seconds)
        raise StepError("enough")

    monkeypatch.setattr(_report, "compile_for", compiling)
    assert main(["report", "mine:step", "--target", "cpu:2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["compiling for cpu:2 ...", "compiling for cpu:2: 61 s"]
    assert said[2:] == ["compiling for cpu:2: 121 s", "StepError: enough"]


def test_a_binary_file_is_no_report(tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    assert main(["report", str(tmp_path / "a.json")]) == 2
    assert "a.json  is not text" in capsys.readouterr().err


def test_tables_fold_to_a_narrow_terminal_alone(capsys, monkeypatch):
    def widest():
        assert main(["hardware"]) == 0
        return max(map(len, capsys.readouterr().out.splitlines()))

    monkeypatch.setenv("COLUMNS", "60")
    piped = widest()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert widest() < 80 <= piped


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--set", "train.seed=abc", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "expected int, got 'abc'." in shown


def failing(error: BaseException) -> tuple[Command, ...]:
    def run(arguments):
        raise error

    return (Command("train", "fails", run),)


def test_a_bug_is_told_apart_and_points_to_debug(capsys, monkeypatch):
    monkeypatch.setattr(entry, "COMMANDS", failing(RuntimeError("broken inside")))
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert "shardkit has failed: RuntimeError: broken inside" in shown
    assert "--debug" in shown
    assert "Traceback" not in shown


def test_ctrl_c_is_exit_code_130_with_the_note(capsys, monkeypatch):
    stop = KeyboardInterrupt()
    stop.add_note("Metrics so far are in here.jsonl.")
    monkeypatch.setattr(entry, "COMMANDS", failing(stop))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\nMetrics so far are in here.jsonl.\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["train", "--stes", "5"], ["train", "a", "b"]])
def test_words_that_are_no_command_show_the_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: shardkit" in capsys.readouterr().err


def shell(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """`shardkit` as a user starts it, without the devices that the tests simulate."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cache}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "shardkit", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_smallest_config_is_ended_by_ctrl_c_and_goes_on_to_its_end(tmp_path):
    given = ("train.steps=60", "train.sample=0", "train.baselines=false")
    words = ["train", str(ROOT / "configs" / "nano.py")]
    words += [word for one in given for word in ("--set", one)]
    process = shell(tmp_path, *words)
    path = tmp_path / "runs" / "nano" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (path.exists() and path.read_text().count("\n") > 1):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["kind"] for row in lines[-3:]] == ["save", "stopped", "goodput"]
    assert lines[-2]["why"] == "interrupted"
    done = lines[-3]["step"]
    assert errors == (
        f"Interrupted.\nStep {done} is saved. Rerun the same command to resume.\n"
        "Metrics so far are in runs/nano/metrics.jsonl.\n"
    )
    assert Checkpointer(tmp_path / "runs" / "nano" / "checkpoints").steps()[-1] == done

    shown, errors = (process := shell(tmp_path, *words)).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"resumed runs/nano at step {done} of 60" in shown
    result, finished, _ = map(json.loads, path.read_text().splitlines()[-3:])
    assert finished["kind"] == "finished"
    assert re.search(rf"^ *{result['bits_per_byte']:.3f}  this", shown, re.M)
    assert result["bits_per_byte"] < 8
