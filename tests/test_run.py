"""The loop beside a fake step that can be computed by hand, then a real small run."""

import io
import json
import math
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from shardkit._core.errors import ConfigError, DataError, StepError
from shardkit.data import Corpus, DataConfig, Text
from shardkit.lm import (
    SIZES,
    TextTrainConfig,
    measure_bits_per_token,
    printable,
    sample_tokens,
    train,
)
from shardkit.lm._scores import spread_batches
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies
from shardkit.processes import ProcessGroup
from shardkit.run import _clock
from shardkit.run._clock import Clock
from shardkit.run._console import draw_mesh, layout_rows, total_row
from shardkit.run._folder import RunFolder, create_folder
from shardkit.run._loop import Loop
from shardkit.run._metrics_file import MetricsFile, read_metrics
from shardkit.run._metrics_rows import log_exception
from shardkit.run._source import as_source
from shardkit.run._throughput import Throughput
from shardkit.run.callbacks import Callback, RunContext, StepMetrics
from shardkit.run.callbacks._finite import FiniteCheck
from shardkit.run.callbacks._progress import ProgressDisplay

from ._damages import full_disk

TEXT = Text(
    Corpus("a test", bytes(range(97, 123)) * 20, bytes(range(1, 101)), 1, 1),
    DataConfig(seq_len=8, batch_size=3, overlap=2),
)


class FakeStep:
    """Counts; its loss is the mean target byte, weighted, which a test can compute too."""

    def __init__(self, bad_at: int | None = None) -> None:
        self.events: list[str] = []
        self.bad_at = bad_at

    local_rows = slice(None)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = types.SimpleNamespace(on_nonfinite="apply")

    def shard_batch(self, batch):
        return batch

    def __call__(self, state, batch):
        self.events.append(f"step {state}")
        loss = float("nan") if state == self.bad_at else float(state)
        return state + 1, {"loss": Late(loss, f"read {state}", self.events), "grad_norm": 1.0}

    def evaluate(self, state, batch):
        self.events.append("evaluate")
        weights, targets = batch["weights"], batch["targets"]
        return {"loss": float((weights * targets).sum() / weights.sum())}


class Late:
    """A number that notes when it is read, as a device array that is waited for."""

    def __init__(self, value: float, name: str, events: list[str]) -> None:
        self.value, self.name, self.events = value, name, events

    def __float__(self) -> float:
        self.events.append(self.name)
        return self.value


class Noting(Callback):
    def __init__(self) -> None:
        self.told: list[tuple] = []

    def on_step(self, metrics):
        self.told.append((metrics.step, metrics.values["loss"], metrics.remaining))

    def on_eval(self, step, values):
        self.told.append((step, *values))


def run(tmp_path, step, batches=None, **config):
    noting, config = Noting(), TextTrainConfig(**config)

    def evaluate(step, state):
        bits, scored = measure_bits_per_token(
            step, state, TEXT, spread_batches(TEXT, config.eval_batches)
        )
        return {"bits_per_byte": bits, "bytes": scored}

    with MetricsFile(tmp_path) as file:
        folder = RunFolder(file, config, as_source(batches or TEXT.batch, dict), {}, print)
        loop = Loop(
            step,
            folder,
            [FiniteCheck(1), noting],
            evaluate=evaluate,
            tokens=24,
            process_group=ProcessGroup(),
        )
        state = loop.run(0)
    return state, noting.told, rows(tmp_path)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the loop


def test_numbers_are_read_one_step_late_and_all_of_them(tmp_path):
    step = FakeStep()
    state, said, lines = run(tmp_path, step, steps=3, eval_every=0)
    assert step.events == ["step 0", "step 1", "read 0", "step 2", "read 1", "read 2"]
    assert state == 3
    assert said == [(1, 0.0, 2), (2, 1.0, 1), (3, 2.0, 0)]
    assert [(row["step"], row["loss"]) for row in lines] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert set(lines[0]) == {
        "kind", "step", "loss", "grad_norm", "seconds", "data_seconds", "tokens_per_second", "time",
    }  # fmt: skip
    assert lines[2]["tokens_per_second"] == 24 / lines[2]["seconds"]


def test_evaluations_on_the_way_come_when_they_are_due(tmp_path):
    step = FakeStep()
    _, said, lines = run(tmp_path, step, steps=4, eval_every=2, eval_batches=2)
    assert [row["kind"] for row in lines] == ["step", "step", "eval", "step", "step", "eval"]
    assert step.events.count("evaluate") == 4
    assert lines[2]["step"] == 2
    assert lines[2]["seconds"] > 0
    assert said[2] == (2, "bits_per_byte", "bytes")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(StepError) as error:
        run(tmp_path, FakeStep(bad_at=2), steps=10, eval_every=0)
    assert "The run has diverged." in str(error.value)
    assert "step 3" in str(error.value)
    assert "loss is nan" in str(error.value)
    assert "optimizer.lr=" in str(error.value)
    assert (rows(tmp_path)[-1]["step"], rows(tmp_path)[-1]["loss"]) == (3, None)


def test_data_that_ends_before_the_run_says_when(tmp_path):
    with pytest.raises(
        DataError, match=r"the data +gave 2 batches for a run of 5 updates"
    ) as error:
        run(tmp_path, FakeStep(), batches=[TEXT.batch(0)] * 2, steps=5)
    assert "Fix: TrainConfig(steps=2), or data that repeats" in str(error.value)
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_metrics_of_the_loss_may_not_be_columns_of_the_file(tmp_path):
    class Clashing(FakeStep):
        def __call__(self, state, batch):
            return state + 1, {"loss": 1.0, "seconds": 2.0}

    with pytest.raises(StepError, match=r"seconds +is already a column of metrics\.jsonl"):
        run(tmp_path, Clashing(), steps=2)


def test_validation_bits_weigh_every_byte_alike():
    bits, scored = measure_bits_per_token(FakeStep(), 0, TEXT, range(TEXT.validation_steps))
    assert scored == TEXT.validation_bytes == 100
    # 100 bytes in batches of 3 x 6: a mean of the batches' means would be another number.
    assert bits == pytest.approx(np.mean(np.arange(1, 101)) / math.log(2))
    means = [FakeStep().evaluate(0, TEXT.validation_batch(i))["loss"] for i in range(6)]
    assert bits != pytest.approx(np.mean(means) / math.log(2), rel=1e-3)


def test_the_clock_tells_updates_from_waiting_and_from_what_is_no_update(monkeypatch):
    now = iter([100.0, 100.5, 101.5, 104.0, 106.0, 107.0, 117.0, 121.0])
    monkeypatch.setattr(_clock.time, "perf_counter", lambda: next(now))
    clock = Clock(steps=11)
    with clock.time_data():
        pass
    first = clock.finish_step(1, {})
    assert (first.seconds, first.data_seconds, first.mean_seconds, first.remaining) == (
        4.0,
        1.0,
        None,
        10,
    )
    second = clock.finish_step(2, {})
    assert (second.seconds, second.data_seconds, second.mean_seconds) == (2.0, 0.0, 2.0)
    with clock.exclude() as spent:
        pass
    assert spent == {"seconds": 10.0}
    third = clock.finish_step(3, {})
    assert (third.seconds, third.mean_seconds) == (5.0, 3.5)
    assert (third.mean_data_seconds, third.remaining) == (0.0, 8)


# --- files


def test_a_folder_that_exists_is_never_written_to(tmp_path):
    wanted = tmp_path / "runs" / "mine"
    assert [create_folder(wanted).name for _ in range(3)] == ["mine", "mine-2", "mine-3"]


def test_a_folder_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created\.\n.*\nFix: --set train\.out=FOLDER"):
        create_folder(tmp_path / "file" / "run")


def test_each_metric_is_a_whole_line_at_once(tmp_path):
    with MetricsFile(tmp_path) as file:
        for i in range(3):
            file.write("step", step=i, loss=0.5)
            lines = file.path.read_text().split("\n")
            assert lines[-1] == ""
            assert set(json.loads(lines[0])) == {"kind", "step", "loss", "time"}
            assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(i + 1))
        with pytest.raises(ValueError, match="JSON"):
            file.write("step", loss=float("inf"))
    assert len(file.path.read_text().splitlines()) == 3


def test_a_pipe_where_metrics_were_gets_no_rows(tmp_path):
    with MetricsFile(tmp_path) as metrics:
        metrics.path.unlink()
        os.mkfifo(metrics.path)
        with pytest.raises(ConfigError, match="cannot be written"):
            metrics.write("step", step=1)


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda folder: folder.rename(f"{folder}-old")])
def test_metrics_whose_folder_was_deleted_or_moved_are_written_again(lose, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with MetricsFile(folder) as metrics:
        metrics.write("step", step=1)
        lose(folder)
        with pytest.warns(RuntimeWarning, match="was deleted or moved during the run"):
            metrics.write("step", step=2)
        metrics.write("step", step=3)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]


def test_a_row_without_room_is_an_error_that_leaves_whole_rows(tmp_path):
    with MetricsFile(tmp_path) as file:
        file.write("step", step=1)
        there = file.path.read_bytes()
        said = r"cannot be written\.\n  .*metrics\.jsonl +File too large; .*\nFix: free space and"
        with full_disk(len(there) + 9), pytest.raises(ConfigError, match=said):
            file.write("step", step=2)
        assert file.path.read_bytes() == there
        # What the run ends for is told, not that it could not be noted.
        with full_disk(len(there) + 9), pytest.raises(KeyError, match="first"), log_exception(file):
            raise KeyError("first")


def test_a_run_that_continues_without_rows_warns_once(tmp_path):
    said = []
    with MetricsFile(tmp_path, report_error=said.append) as file:
        with full_disk(9):
            file.write("step", step=1)
            file.write("step", step=2)
        file.write("step", step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]
    assert len(said) == 1


def test_metrics_that_cannot_be_opened_say_so(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl +Is a directory"):
        MetricsFile(tmp_path, 3)


def test_the_save_that_is_shown_is_on_the_disk(tmp_path):
    out, whole = io.StringIO(), set()
    shown = ProgressDisplay(Console(file=out, width=200), 1, lambda values: "")
    run = RunContext(
        folder=tmp_path,
        step=FakeStep(),
        throughput=Throughput(8, "rows", True),
        start=0,
        steps=99,
        record={},
        write=print,
        say=print,
        stop=print,
        is_saved=lambda step: step in whole,
    )
    shown.on_start(run, None)

    def line(step):
        shown.on_step(StepMetrics(step, {}, 1.0, 0.0, 1.0, 0.0, 99 - step))
        return out.getvalue().splitlines()[-1]

    shown.on_save(2)
    assert "saved" not in line(3)
    whole.add(2)
    assert "saved 2, 0 s ago" in line(3)
    shown.on_save(4)
    assert "saved 2, 0 s ago" in line(5)
    whole.add(4)
    assert "saved 4, 0 s ago" in line(5)


# --- tables


@pytest.fixture
def mesh() -> Mesh:
    return MeshSpec(data=2, tensor=4).build("cpu:8")


def abstract(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_layout_rows_group_what_differs_in_numbers_alone(mesh):
    layer = {"w": abstract(mesh, (8, 16), None, "tensor"), "b": abstract(mesh, (16,))}
    rows = layout_rows({"layers": [layer, layer], "head": abstract(mesh, (16, 32), "data")})
    assert [(r.path, r.leaves, r.type, r.spec, r.whole, r.per_device) for r in rows] == [
        ("head", 1, "f32[16,32]", "P('data',)", 2048, 1024),
        ("layers/*/w", 2, "f32[8,16]", "P(None, 'tensor')", 1024, 256),
        ("layers/*/b", 2, "f32[16]", "P()", 128, 128),
    ]
    total = total_row("all", layer)
    assert (total.leaves, total.whole, total.per_device) == (2, 512 + 64, 128 + 64)


def test_many_kinds_of_leaves_still_fit_a_screen(mesh):
    tree = {f"name{c}": abstract(mesh, (4, 8 + ord(c))) for c in "abcdefghijklmnopqrstuvwxyz"}
    rows = layout_rows(tree, limit=14)
    assert len(rows) == 14
    assert rows[-1].path == "13 smaller leaves"
    assert sum(row.whole for row in rows) == total_row("all", tree).whole


def test_a_mesh_of_three_axes_is_drawn_row_by_row_and_a_large_one_not_at_all():
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    drawn = draw_mesh(Mesh(devices, ("a", "b", "c")))
    assert [line.split() for line in drawn[2:]] == [
        ["a", "0", "b", "0", "0", "1"],
        ["a", "0", "b", "1", "2", "3"],
        ["a", "1", "b", "0", "4", "5"],
        ["a", "1", "b", "1", "6", "7"],
    ]
    assert draw_mesh(Mesh(np.array(list(jax.devices()) * 16), ("x",))) == []


# --- samples


def follow(params, row, at):
    """Surely the byte after the one at `at`, for a model that looks at nothing else."""
    return jnp.where(jnp.arange(256) == (row[0, at] + params) % 256, 50.0, 0.0)


def drawn(next_token, params, prompt, count, window, key=0, vocabulary=256):
    return sample_tokens(
        next_token,
        params,
        prompt,
        count=count,
        window=window,
        vocabulary=vocabulary,
        temperature=1.0,
        key=jax.random.key(key),
    ).tolist()


@pytest.mark.parametrize("window", [2, 5, 40])
def test_a_sample_continues_its_prompt_in_a_window_of_any_length(window):
    assert drawn(follow, jnp.int32(1), b"abc", 20, window) == list(range(100, 120))


def test_a_full_window_moves_on_by_one_token():
    def skip(params, row, at):
        return jnp.where(jnp.arange(256) == row[0, at - 1] + 2, 50.0, 0.0)

    assert drawn(skip, None, [97, 98], 20, 4) == list(range(99, 119))


def test_temperature_and_key_decide_what_is_drawn():
    def flat(params, row, at):
        return jnp.zeros(256)

    draws = [drawn(flat, None, b"a", 30, 8, key) for key in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 10
    assert set(drawn(flat, None, b"a", 30, 8, vocabulary=3)) == {0, 1, 2}


def test_what_is_not_printable_is_escaped():
    assert printable(b"a\x07\xff\x00b") == "a\\x07\\xff\n--- end of file ---\nb"


# --- a real run


def test_a_small_run_shows_and_writes_everything(tmp_path, mesh):
    for i in range(60):
        (tmp_path / f"text{i}.txt").write_text(f"the quick brown fox number {i}\n" * 8)
    out = io.StringIO()
    result = train(
        name="test",
        model=SIZES["nano"],
        data=DataConfig(path=str(tmp_path), seq_len=32, batch_size=4, validation_fraction=0.1),
        mesh=MeshSpec(data=4, tensor=2).build("cpu:8"),
        strategy=strategies.data() | strategies.tensor(),
        optimizer=optax.adamw(1e-2),
        loop=TextTrainConfig(
            steps=12, eval_every=6, log_every=4, sample=10, out=str(tmp_path / "run")
        ),
        record={"name": "test"},
        console=Console(file=out, width=100),
    )
    shown = out.getvalue()
    for part in (
        "mesh data=4 × tensor=2  (8 devices: simulated CPU devices, not a speed claim)",
        "validation: ",
        "layers/gate",
        "P(None, None, 'tensor')",
        "step  1/12",
        "step 12/12",
        "tokens/s (simulated)",
        "each scored once",
        "this model",
        "xz -9 after train",
        "a sample that it wrote",
        "metrics.jsonl",
    ):
        assert part in shown, part
    assert max(map(len, shown.splitlines())) <= 120 + len(str(tmp_path))

    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "start"
    assert lines[0]["config"] == {"name": "test"}
    assert lines[0]["mesh"] == {"data": 4, "tensor": 2}
    assert lines[0]["device"]["simulated"] is True
    assert lines[0]["versions"]["jax"] == jax.__version__
    steps = [row for row in lines if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["kind"] for row in lines[-6:]] == [
        "eval", "baselines", "sample", "result", "finished", "goodput"
    ]  # fmt: skip
    assert lines[-3]["bits_per_byte"] == result.bits_per_byte
    assert 0 < result.bits_per_byte < 8
    assert len(result.sample) == 10
    assert set(result.seconds) == {"train", "evaluate", "baselines", "sample"}


def test_ctrl_c_leaves_whole_metrics_and_says_where(tmp_path, mesh):
    class Interrupting(Console):
        def print(self, *objects, **options):
            if objects and str(objects[0]).startswith("step 3"):
                raise KeyboardInterrupt
            super().print(*objects, **options)

    (tmp_path / "text.txt").write_text("some words to be learnt by heart\n" * 40)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(
            name="test",
            model=SIZES["nano"],
            data=DataConfig(
                path=str(tmp_path / "text.txt"), seq_len=16, batch_size=8, validation_fraction=0.2
            ),
            mesh=mesh,
            strategy=strategies.data() | strategies.data("tensor"),
            optimizer=optax.sgd(1e-2),
            loop=TextTrainConfig(steps=9, eval_every=0, log_every=1, out=str(tmp_path / "run")),
            record={},
            console=Interrupting(file=io.StringIO(), width=100),
        )
    path = tmp_path / "run" / "metrics.jsonl"
    assert stop.value.__notes__ == [f"Metrics so far are in {path}."]
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["start", "check", "step", "step", "step", "stopped", "goodput"]
