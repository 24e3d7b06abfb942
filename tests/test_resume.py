"""A run that was ended goes on as if nothing had happened, or says why it does not."""

import dataclasses
import io
import os
import signal

import optax
import pytest
from rich.console import Console

import shardkit as sk
from shardkit.checkpoint import _pending_save as _saving
from shardkit.data import Corpus, DataConfig, Text
from shardkit.lm import DecoderConfig, compile_run
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies
from shardkit.run import Stopped, TrainConfig
from shardkit.run._metrics_file import MetricsFile, read_metrics
from shardkit.run._resume import decide_resume
from shardkit.run.callbacks import Callback

from . import _checkpoints as ck

DATA = DataConfig(seq_len=16, batch_size=8)
TEXT = Text(Corpus("a test", bytes(range(97, 123)) * 60, bytes(range(1, 101)), 1, 1), DATA)
MODEL = DecoderConfig(
    vocab=256, embed_dim=16, num_layers=2, num_heads=2, kv_heads=2, head_dim=8, mlp_dim=32
)
RECORD = {"model": {"embed_dim": 16}, "train": {"seed": 0, "steps": 7}, "mesh": "any"}
LOOP = TrainConfig(steps=7, eval_every=0, checkpoint_every=2, log_every=1, resume="auto")


def compiled(**axes):
    strategy = strategies.data() | strategies.tensor()
    mesh = MeshSpec(**axes).build("cpu:8")
    return compile_run(MODEL, DATA, mesh, strategy, optax.sgd(0.5, momentum=0.9))


@pytest.fixture(scope="module")
def step():
    return compiled(data=4, tensor=2)


@pytest.fixture(scope="module")
def other_mesh():
    return compiled(data=8, tensor=1)


class At(Callback):
    """Calls something when the metrics of one step are told."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_start(self, run, state):
        self.run = run

    def on_step(self, metrics):
        if metrics.step == self.step:
            self.do()


def run(folder, step, loop=LOOP, at=None, do=None, text=TEXT, record=RECORD):
    """Trains to the end; `do` is called when step `at` is told."""
    out, callback = io.StringIO(), At(at, do)
    trainer = sk.Trainer(
        step,
        sk.data.Loader(text, step.batch_shardings),
        folder,
        loop,
        callbacks=[callback],
        record=record,
        decides=("model", "train"),
        console=Console(file=out, width=400),
    )
    return ck.bits(trainer.run()), out.getvalue(), callback.run.folder


def interrupt():
    raise KeyboardInterrupt


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if row["kind"] == "step"}


@pytest.fixture(scope="module")
def whole(step, tmp_path_factory):
    """Bits and losses of a run that nothing breaks."""
    bits, _, folder = run(tmp_path_factory.mktemp("whole") / "run", step)
    return bits, losses(folder)


# --- going on


def test_a_run_that_was_ended_goes_on_bit_for_bit(tmp_path, step, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", step, at=6, do=interrupt)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    bits, shown, folder = run(tmp_path / "run", step)
    assert f"resumed {folder} at step 6 of 7" in shown or "at step 4 of 7" in shown
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["kind"] for row in rows].count("resumed") == 1
    assert (bits, losses(folder)) == whole


def test_a_run_goes_on_with_the_same_losses_on_another_mesh(tmp_path, step, other_mesh, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", step, at=3, do=interrupt)
    _, shown, folder = run(tmp_path / "run", other_mesh)
    assert "at step 2 of 7, saved" in shown
    assert "on mesh data=4 × tensor=2" in shown
    assert losses(folder).keys() == whole[1].keys()
    assert list(losses(folder).values()) == pytest.approx(list(whole[1].values()), rel=1e-5)


def test_a_finished_run_is_left_alone(tmp_path, step):
    for name in ("run", "run-2"):
        assert run(tmp_path / "run", step, dataclasses.replace(LOOP, steps=1))[2].name == name


def test_a_finished_run_says_so_and_goes_on_with_more_steps(tmp_path, step, whole):
    shorter = dataclasses.replace(LOOP, steps=3)
    run(tmp_path / "run", step, shorter)
    _, shown, folder = run(tmp_path / "run", step, shorter)
    assert folder.name == "run-2"
    assert (
        f"{tmp_path}/run is finished (3 steps). A new run starts in {tmp_path}/run-2; "
        "--set train.steps=6 goes on with it.\n"
    ) in shown
    _, shown, folder = run(tmp_path / "run", step, shorter)
    assert f"{tmp_path}/run-2 is finished (3 steps). A new run starts in {tmp_path}/run-3" in shown
    bits, shown, folder = run(tmp_path / "run", step)
    assert folder.name == "run-3"
    assert f"resumed {folder} at step 3 of 7" in shown
    assert (bits, losses(folder)) == whole
    assert [row["kind"] for row in read_metrics(folder)].count("finished") == 1
    changed = {**RECORD, "model": {"embed_dim": 17}}
    _, shown, other = run(tmp_path / "run", step, shorter, record=changed)
    assert other.name == "run-4"
    assert "is finished" not in shown


def test_a_damaged_checkpoint_is_passed_over_and_its_steps_made_again(tmp_path, step, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", step, at=5, do=interrupt)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    next((newest / "arrays" / "state" / "params").rglob("0.0*")).unlink()
    stop = dataclasses.replace(LOOP, on_damage="stop")
    with pytest.raises(sk.errors.CheckpointCorruptedError, match="is gone"):
        run(tmp_path / "run", step, stop)
    bits, shown, folder = run(tmp_path / "run", step)
    assert "is gone" in shown
    assert "Resuming from the step before it." in shown
    assert "at step 2 of 7" in shown
    assert (bits, losses(folder)) == whole
    assert (folder / "checkpoints" / "damaged-step-00000004").is_dir()


def test_metrics_of_steps_that_will_be_made_again_are_cut_off(tmp_path):
    with MetricsFile(tmp_path) as file:
        file.write("start")
        for step in (1, 2, 3, 4):
            file.write("step", step=step, loss=0.5)
            if step % 2 == 0:
                file.write("eval", step=step, part="some")
        file.write("eval", step=4, part="all")
        os.write(file._file, b'{"kind": "st')
    kept = {4: 7, 3: 5, 2: 4, 0: 1}
    for after, lines in kept.items():
        MetricsFile(tmp_path, after)
        assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == lines


@pytest.mark.parametrize("foreign", ['"seconds": 1e400', '"began": NaN', '"step": 9e99'])
def test_a_foreign_row_whose_numbers_have_no_sum_is_no_row(foreign, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "start", {foreign}}}\n{{"kind": "x"}}\n')
    assert read_metrics(tmp_path) == [{"kind": "x"}]


def test_a_line_that_is_no_row_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [f'{{"kind": "step", "step": {i}}}\n' for i in (1, 2, 3)]
    path.write_text(steps[0] + "\0\0\0\n" + steps[1] + steps[2] + '{"kind": "step", "step": 2}')
    file = MetricsFile(tmp_path, 2)
    assert [row["step"] for row in file.kept_rows] == [1, 2]
    assert [row["step"] for row in file.dropped_rows] == [3, 2]
    assert file.broken_lines == [2]
    # The row without an end of its line is not written on.
    assert path.read_text() == steps[0] + "\0\0\0\n" + steps[1]


# --- choosing


def begin(folder, text=TEXT, record=RECORD, **loop):
    return decide_resume(
        folder / "run",
        dataclasses.replace(LOOP, **loop),
        sk.data.Loader(text, {}),
        record=record,
        decides=("model", "train"),
        process_group=sk.ProcessGroup(),
    )


@pytest.fixture(scope="module")
def unfinished(step, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "run", step, at=3, do=interrupt)
    return folder


def test_settings_that_decide_metrics_must_be_the_same(unfinished):
    assert begin(unfinished).resumed
    assert begin(unfinished, record={**RECORD, "mesh": "another"}).resumed
    assert not begin(unfinished, resume="never").resumed
    assert not begin(unfinished, checkpoint_every=0).resumed
    other = {**RECORD, "model": {"embed_dim": 32}}
    anew = begin(unfinished, record=other)
    assert not anew.resumed
    assert anew.notes == (
        f"{unfinished}/run has other settings (model.embed_dim was 16, is 32). Starting a new run.",
        f"To resume {unfinished}/run with them: --set train.resume_with=model.embed_dim",
    )
    with pytest.raises(sk.errors.CheckpointError) as error:
        begin(unfinished, record=other, resume=str(unfinished / "run"))
    assert "with 1 changed setting." in str(error.value)
    assert "model.embed_dim  was 16, is 32" in str(error.value)
    assert "--set model.embed_dim=16" in str(error.value)


def test_a_run_asked_for_by_name_may_be_longer(unfinished):
    longer = {**RECORD, "train": {"seed": 0, "steps": 9}}
    assert not begin(unfinished, record=longer).resumed
    for name in ("run", "run/checkpoints"):
        named = begin(unfinished, record=longer, resume=str(unfinished / name))
        assert (named.resumed, named.folder) == (True, unfinished / "run")


def test_another_text_is_another_run(unfinished):
    for part in ("validation", "train"):
        changed = {part: getattr(TEXT.corpus, part)[::-1]}
        text = Text(dataclasses.replace(TEXT.corpus, **changed), DATA)
        assert not begin(unfinished, text=text).resumed
    with pytest.raises(
        sk.errors.CheckpointError,
        match=r"a test +is not the data that the run read: crc32 was '[0-9a-f]{8}', is",
    ):
        begin(unfinished, text=text, resume=str(unfinished / "run"))


def test_a_run_that_is_under_way_is_not_joined(unfinished):
    with sk.Checkpointer(unfinished / "run" / "checkpoints"):
        anew = begin(unfinished)
    assert not anew.resumed
    assert "is in use by another process" in anew.notes[0]


def test_what_is_no_run_is_told(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(sk.errors.CheckpointError, match="contains photos but no checkpoint"):
        begin(tmp_path, resume=str(tmp_path))
    with pytest.raises(sk.errors.CheckpointError, match="is not a run folder"):
        begin(tmp_path, resume=str(tmp_path / "none"))


# --- being stopped


@pytest.mark.parametrize(
    ("which", "kind"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_run_with_its_state_saved(which, kind, tmp_path, step, whole):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def send():
        os.kill(os.getpid(), which)
        # The system's own handler stands already for a second one, which ends the process.
        seen.append(signal.getsignal(which))

    with pytest.raises(kind) as stop:
        run(tmp_path / "run", step, at=3, do=send)
    assert seen == [signal.SIG_DFL]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    # Step 3 is shown while step 4 is under way, after which the loop looks; 5 is the next.
    done = max(losses(tmp_path / "run"))
    assert stop.value.__notes__ == [
        f"Step {done} is saved. Rerun the same command to resume.",
        f"Metrics so far are in {tmp_path}/run/metrics.jsonl.",
    ]
    assert sk.Checkpointer(tmp_path / "run" / "checkpoints").steps()[-1] == done
    bits, _, folder = run(tmp_path / "run", step)
    assert (bits, losses(folder)) == whole


# --- a disk that fails


def failing(monkeypatch, steps):
    real = _saving.commit

    def commit(written, root, step, manifest):
        if step in steps:
            raise OSError(28, "No space left on device")
        real(written, root, step, manifest)

    monkeypatch.setattr(_saving, "commit", commit)


def test_a_run_whose_save_is_lost_stops_or_goes_on_as_declared(tmp_path, step, monkeypatch):
    failing(monkeypatch, {4})
    with pytest.raises(sk.errors.CheckpointError, match=r"step 4 +could not be written"):
        run(tmp_path / "stops", step)
    assert read_metrics(tmp_path / "stops")[-2]["kind"] == "stopped"
    assert max(losses(tmp_path / "stops")) == 6

    continuing = dataclasses.replace(LOOP, on_save_error="continue")
    _, shown, folder = run(tmp_path / "goes", step, continuing)
    assert "No space left on device" in shown
    assert "Training continues" in shown
    lost = [row for row in read_metrics(folder) if row["kind"] == "save_failed"]
    assert len(lost) == 1
    assert sk.Checkpointer(folder / "checkpoints").steps() == (6, 7)


def test_a_run_whose_last_save_is_lost_ends_with_an_error(tmp_path, step, monkeypatch):
    failing(monkeypatch, {7})
    continuing = dataclasses.replace(LOOP, on_save_error="continue")
    with pytest.raises(sk.errors.CheckpointError, match=r"The last save failed\.\n  step 7"):
        run(tmp_path / "run", step, continuing)
    assert sk.Checkpointer(tmp_path / "run" / "checkpoints").steps() == (4, 6)
