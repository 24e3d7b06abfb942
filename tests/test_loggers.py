"""Where metrics go besides the file, and traces: each is read back."""

import importlib.util
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

import shardkit as sk
from shardkit.run._config import check_profile, parse_profile
from shardkit.run._metrics_file import read_metrics
from shardkit.run.callbacks import _loggers

from .test_trainer import STEPS, at_read, batch_of, interrupt, step

__all__ = ["step"]  # the fixture
ROOT = Path(__file__).parent.parent


def run(folder, step, *callbacks, out=None, **config):
    config = sk.TrainConfig(**{"steps": STEPS, "checkpoint_every": 2, "eval_every": 3} | config)
    sk.Trainer(
        step,
        batch_of,
        folder,
        config,
        evaluate=lambda step, state: step.evaluate(state, batch_of(99)),
        callbacks=callbacks,
        console=Console(file=out or io.StringIO(), width=200),
    ).run()


def scalars(folder):
    """`{tag: {step: value}}` of the event files, the newest of a step counting."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = {}
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            record = content[at + 12 : at + 12 + length]
            crc = int.from_bytes(content[at + 12 + length : at + 16 + length], "little")
            assert crc == masked_crc32c(record)
            event = Event.FromString(record)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            at += 16 + length
    return found


def test_tensorboard_holds_every_number_of_both_lives_of_a_run(tmp_path, step, monkeypatch):
    # Both lives start within one second, after which event files are named.
    monkeypatch.setattr(
        "tensorboardX.event_file_writer.time", types.SimpleNamespace(time=lambda: 1.8e9)
    )
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, step, at_read(5, interrupt), loggers=("tensorboard",))
    run(folder, step, loggers=("tensorboard",))
    rows = read_metrics(folder)
    found = scalars(folder / "tensorboard")
    told = {row["step"]: row for row in rows if row["kind"] == "step"}
    assert set(told) == set(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "error", "seconds", "data_seconds", "rows_per_second"):
        values = {i: pytest.approx(row[name], rel=1e-6) for i, row in told.items()}
        assert found[f"train/{name}"] == values
    evaluated = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    assert list(evaluated) == [3, STEPS]
    assert found["eval/loss"] == pytest.approx(evaluated, rel=1e-6)


OFFLINE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.test_loggers import run
from tests.test_trainer import at_read, compiled, interrupt
from pathlib import Path
step = compiled()
folder = Path(__import__("sys").argv[1])
try:
    run(folder, step, at_read(5, interrupt), loggers=("wandb",))
except KeyboardInterrupt:
    pass
run(folder, step, loggers=("wandb",))
"""


class FakeRun:
    def __init__(self, settings):
        self.settings, self.logged, self.ended, self.defined = settings, [], None, []

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended = exit_code


class FakeWandB:
    """What of the package is used."""

    Settings, __spec__ = dict, object()

    def __init__(self):
        self.runs = []

    def init(self, **settings):
        self.runs.append(FakeRun(settings))
        return self.runs[-1]


def test_weights_and_biases_sees_one_run_for_both_lives(tmp_path, step, monkeypatch):
    fake, folder = FakeWandB(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(KeyboardInterrupt):
        run(folder, step, at_read(5, interrupt), loggers=("wandb",))
    run(folder, step, loggers=("wandb",))
    first, second = fake.runs
    assert first.settings["id"] == second.settings["id"] == (folder / "wandb.id").read_text()
    assert (first.settings["resume"], first.settings["dir"]) == ("allow", str(folder))
    assert first.defined == [("*", "step")]
    assert (first.ended, second.ended) == (1, 0)
    logged = [values for one in fake.runs for values in one.logged]
    told = {row["step"]: row["loss"] for row in read_metrics(folder) if row["kind"] == "step"}
    assert {v["step"]: v["train/loss"] for v in logged if "train/loss" in v} == told
    assert [v["step"] for v in logged if "eval/loss" in v] == [3, STEPS]


@pytest.mark.slow
def test_weights_and_biases_without_a_login_is_refused_before_anything_is_compiled(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(_loggers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(sk.errors.ConfigError) as refused:
        _loggers.check_loggers(["wandb"])
    assert "train.loggers=wandb  needs a login" in str(refused.value)
    assert "wandb login; or WANDB_MODE=offline" in str(refused.value)
    (tmp_path / ".netrc").write_text("machine other.host login user password 1\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(sk.errors.ConfigError, match="needs a login"):
        _loggers.check_loggers(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 1\n")
    _loggers.check_loggers(["wandb"])
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    _loggers.check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "1")
    _loggers.check_loggers(["wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    _loggers.check_loggers(["wandb"])


def test_weights_and_biases_that_cannot_start_is_the_users_error(tmp_path, step, monkeypatch):
    class Refusing(FakeWandB):
        def init(self, **settings):
            raise RuntimeError("invalid API key")

    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(sk.errors.ConfigError, match="cannot start: invalid API key") as refused:
        run(tmp_path / "run", step, loggers=("wandb",))
    assert "WANDB_MODE=offline" in str(refused.value)


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="an extra, and not installed")
def test_weights_and_biases_itself_takes_it_offline(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", OFFLINE, str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (name,) = {path.stem for path in (tmp_path / "run" / "wandb").rglob("run-*.wandb")}
    assert name == f"run-{(tmp_path / 'run' / 'wandb.id').read_text()}"


def test_a_logger_that_is_unknown_or_missing_is_told_before_anything_is_compiled(tmp_path):
    real = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _loggers.importlib.util, "find_spec", lambda n: None if n == "wandb" else real(n)
        )
        with pytest.raises(sk.errors.ConfigError) as error:
            run(tmp_path / "run", lambda: pytest.fail("compiled"), loggers=("tensorbord", "wandb"))
    assert str(error.value) == (
        "Metrics cannot go to 2 loggers.\n"
        "  train.loggers=tensorbord  is not one of tensorboard, wandb. "
        "Did you mean 'tensorboard'?\n"
        "  train.loggers=wandb       needs the package wandb, which is not installed.\n"
        "Fix:\n"
        "  - --set train.loggers=tensorboard,wandb\n"
        "  - pip install 'shardkit[wandb]'\n"
        "  - metrics.jsonl is written in any case"
    )
    assert not (tmp_path / "run").exists()


# --- traces


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ten", "is not a range of updates first:last."),
        ("0:3", "begins before the first update, which is 1."),
        ("5:4", "ends before it begins: 4 < 5."),
        ("5:61", "ends after the last update, train.steps=60."),
    ],
)
def test_a_range_that_cannot_be_traced_is_refused(text, why):
    with pytest.raises(sk.errors.ConfigError) as error:
        sk.TrainConfig(steps=60, profile=text)
    assert f"profile={text}  {why}" in str(error.value)
    assert "Fix: --profile 10:15" in str(error.value)
    assert parse_profile("10:60", 60) == (10, 60)


def test_a_trace_of_some_updates_is_in_the_runs_folder(tmp_path, step):
    out = io.StringIO()
    run(tmp_path / "run", step, out=out, profile="2:3")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert f"trace of updates 2 to 3: {tmp_path}/run/profile" in out.getvalue()
    # It can be read, and holds what was running.
    from jax.profiler import ProfileData

    names = [
        e.name
        for p in ProfileData.from_file(str(trace)).planes
        for line in p.lines
        for e in line.events
    ]
    assert names


def test_a_range_that_a_run_has_behind_it_is_refused(tmp_path, step):
    check_profile("5:10", 60, 9)
    with pytest.raises(sk.errors.ConfigError, match="is over: the run resumes from update 10"):
        check_profile("5:10", 60, 10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", step, at_read(6, interrupt))
    with pytest.raises(sk.errors.ConfigError, match="resumes from update 4"):
        run(tmp_path / "run", lambda: pytest.fail("compiled"), profile="1:3")
