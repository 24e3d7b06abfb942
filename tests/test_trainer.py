"""`Trainer` in research code: an own model, own data, own callbacks."""

import dataclasses
import io
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import shardkit as sk
from shardkit.hardware import CHIPS
from shardkit.run import Stopped, _throughput
from shardkit.run._metrics_file import read_metrics

STEPS = 6


def init(key):
    return {"w": jax.random.normal(key, (8, 4))}


def loss_fn(params, batch, key):
    error = jnp.mean((batch["x"] @ params["w"]) ** 2)
    return error, {"error": error}


def batch_of(i):
    return {"x": np.random.default_rng(i).normal(size=(8, 8)).astype(np.float32)}


def compiled():
    return sk.compile_step(
        loss_fn,
        optax.adam(1e-2),
        init=init,
        batch=batch_of(0),
        mesh=sk.MeshSpec(data=4, tensor=2).build("cpu:8"),
        strategy=sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data")),
    )


@pytest.fixture(scope="module")
def step():
    return compiled()


def trainer(folder, step, data=batch_of, out=None, **declared):
    config = sk.TrainConfig(steps=STEPS, checkpoint_every=2, eval_every=3, log_every=1)
    declared = {
        "config": config,
        "console": Console(file=out or io.StringIO(), width=100),
    } | declared
    return sk.Trainer(step, data, folder, **declared)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if row["kind"] == "step"}


@pytest.fixture(scope="module")
def by_hand(step):
    """Losses and weights of the loop that everybody would write."""
    state, seen = step.init(jax.random.key(0)), {}
    for i in range(STEPS):
        state, metrics = step(state, batch_of(i))
        seen[i + 1] = float(metrics["loss"])
    return seen, np.asarray(state.params["w"])


class Noting(sk.Callback):
    """Notes every event; may act at one of them."""

    def __init__(self, at=None, do=None):
        self.told, self.at, self.do = [], at, do

    def _note(self, *event):
        self.told.append(event)
        if event == self.at:
            self.do(self)

    def on_start(self, run, state):
        self.run = run
        self._note("on_start", int(state.step))

    def on_dispatch(self, step, state, batch):
        assert int(state.step) == step
        assert batch["x"].sharding.spec == P("data")
        self._note("on_dispatch", step)

    def on_step(self, metrics):
        self._note("on_step", metrics.step)

    def on_eval(self, step, values):
        self._note("on_eval", step)

    def on_save(self, step):
        self._note("on_save", step)

    def on_finish(self, state):
        self._note("on_finish", int(state.step))

    def on_exit(self, error):
        self._note("on_exit", type(error))


def interrupt(callback):
    raise KeyboardInterrupt


def at_read(step, do):
    """Acts when the metrics of a step are told."""
    return Noting(("on_step", step), do)


def test_a_run_is_the_loop_by_hand_with_everything_around_it(tmp_path, step, by_hand):
    callback, out = Noting(), io.StringIO()
    state = trainer(
        tmp_path / "run",
        step,
        out=out,
        evaluate=lambda step, state: step.evaluate(state, batch_of(99)),
        callbacks=[callback],
    ).run()
    np.testing.assert_array_equal(np.asarray(state.params["w"]), by_hand[1])
    assert losses(tmp_path / "run") == by_hand[0]
    assert sk.Checkpointer(tmp_path / "run" / "checkpoints").steps() == (4, 6)
    assert callback.told == [
        ("on_start", 0),
        ("on_dispatch", 1),
        ("on_dispatch", 2), ("on_step", 1), ("on_step", 2), ("on_save", 2),
        ("on_dispatch", 3), ("on_step", 3), ("on_eval", 3),
        ("on_dispatch", 4), ("on_step", 4), ("on_save", 4),
        ("on_dispatch", 5),
        ("on_dispatch", 6), ("on_step", 5), ("on_step", 6), ("on_eval", 6), ("on_save", 6),
        ("on_finish", 6),
        ("on_exit", type(None)),
    ]  # fmt: skip
    shown = out.getvalue()
    assert "f32[8,4]  P(None, 'tensor')" in shown
    assert "step 6/6  loss " in shown
    assert "rows/s (simulated)" in shown
    assert "step 3: loss " in shown
    kinds = [row["kind"] for row in read_metrics(tmp_path / "run")]
    assert (kinds[0], *kinds[-2:]) == ("start", "finished", "goodput")


@pytest.mark.parametrize("form", ["function", "iterable", "source"])
def test_data_in_any_form_is_taken_up_where_the_run_was_killed(form, tmp_path, step, by_hand):
    class Own:
        closed = 0

        def batches(self, start):
            try:
                for i in range(start, STEPS):
                    yield batch_of(i)
            finally:
                Own.closed += 1

        def state(self, step):
            return {"next": step, "of": "mine"}

    data = {
        "function": batch_of,
        "iterable": [batch_of(i) for i in range(STEPS)],
        "source": Own(),
    }[form]
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", step, data, callbacks=[at_read(5, interrupt)]).run()
    state = trainer(tmp_path / "run", step, data).run()
    assert losses(tmp_path / "run") == by_hand[0]
    np.testing.assert_array_equal(np.asarray(state.params["w"]), by_hand[1])
    assert Own.closed == (2 if form == "source" else 0)


class Tensor:
    """What a DataLoader of torch yields, as far as numpy knows it."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_tensors_of_other_libraries_are_data_and_scalars_of_the_state_are_metrics(tmp_path):
    spec = compiled().spec.replace(
        optimizer=optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, STEPS))
    )
    mesh = sk.MeshSpec(data=8).build()
    given = {"mesh": mesh, "config": sk.TrainConfig(steps=STEPS, eval_every=0, check="off")}
    spec = spec.replace(strategy=sk.strategies.data())

    def data(i):
        return {name: Tensor(x) for name, x in batch_of(i).items()}

    rates = {"lr": "opt_state/**/learning_rate"}
    sk.Trainer(spec, data, tmp_path / "run", metrics=rates, **given).run()
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    np.testing.assert_allclose(
        [row["lr"] for row in rows], 0.1 * (1 - np.arange(STEPS) / STEPS), 1e-6
    )
    with pytest.raises(sk.errors.ConfigError, match=r"metrics\['lr'\] .* no scalar of the state"):
        sk.Trainer(spec, data, tmp_path / "x", metrics={"lr": "learning_rat"}, **given).run()


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"record": {"run": {"lr": 0.1}}}, r"record\['run'\] +is where checkpoints keep"),
        ({"record": {"lr": np.ones(2)}}, "record +cannot be written as JSON: .*ndarray"),
        ({"metrics": {"lr": 1}}, "metrics +expected mapping of str to str"),
        ({"metrics": ["**/count"]}, "metrics +expected mapping of str to str"),
        ({"metrics": {"loss": "**/count"}}, r"metrics\['loss'\] +is already a column"),
        ({"metrics": {"rows_per_second": "**/count"}}, "is already a column"),
    ],
)
def test_names_and_values_that_a_run_cannot_keep_are_refused_at_once(declared, said, tmp_path):
    with pytest.raises(sk.errors.ConfigError, match=said):
        trainer(tmp_path / "run", compiled, **declared)


def test_a_scalar_of_the_state_takes_no_metric_of_the_loss(tmp_path, step):
    run = trainer(tmp_path / "run", step, metrics={"error": "opt_state/**/count"})
    with pytest.raises(sk.errors.ConfigError, match=r"metrics\['error'\] +is a metric that the"):
        run.run()


def test_a_score_that_is_no_number_is_a_gap_and_ranks_no_checkpoint(tmp_path, step):
    scores = iter([{"bits": float("nan")}, {"bits": 0.5}])
    keep = sk.RetentionPolicy(max_to_keep=9, best_to_keep=1, best_metric="bits")
    config = sk.TrainConfig(steps=4, checkpoint_every=2, eval_every=2)
    run = trainer(tmp_path / "run", step, config=config, retention=keep)
    dataclasses.replace(run, evaluate=lambda step, state: next(scores)).run()
    rows = [row["bits"] for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"]
    assert rows == [None, 0.5]
    saved = sk.Checkpointer(tmp_path / "run" / "checkpoints")
    assert [saved.manifest(i).metrics for i in saved.steps()] == [{}, {"bits": 0.5}]
    again = trainer(tmp_path / "other", step, evaluate=lambda step, state: {"step": 1.0})
    with pytest.raises(
        sk.errors.StepError, match=r"The evaluation returns reserved names(.|\n)*step"
    ):
        again.run()


def test_rows_in_memory_are_data_of_a_run(tmp_path, step):
    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    rows = sk.data.Arrays({"x": x}, rows=8)
    state = trainer(tmp_path / "rows", step, rows).run()
    alike = trainer(tmp_path / "function", step, rows.batch).run()
    np.testing.assert_array_equal(state.params["w"], alike.params["w"])
    other = trainer(tmp_path / "rows", step, sk.data.Arrays({"x": x + 1}, rows=8))
    longer = dataclasses.replace(other, config=dataclasses.replace(other.config, steps=8))
    longer.run()
    assert (tmp_path / "rows-2").exists()  # other rows are another run


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"data": lambda: batch_of(0)}, r"data  is <lambda>\(\), called with 1 argument"),
        ({"evaluate": lambda state: {}}, r"evaluate  is <lambda>\(state\), called with 2"),
        ({"load_params": lambda: {}}, r"load_params  is <lambda>\(\), called with 1 argument"),
    ],
)
def test_functions_of_a_run_that_cannot_be_called(tmp_path, step, declared, said):
    with pytest.raises(sk.errors.ConfigError, match=said):
        trainer(tmp_path / "run", step, **declared)


def test_an_evaluation_that_is_no_dict(tmp_path, step):
    run = trainer(tmp_path / "run", step, evaluate=lambda step, state: 1.0)
    with pytest.raises(sk.errors.StepError, match=r"evaluate  returns a float, not a dict"):
        run.run()


def test_data_of_another_type_is_named_in_a_line(tmp_path, step):
    with pytest.raises(sk.errors.ConfigError, match=r"data  expected a function or") as caught:
        trainer(tmp_path / "run", step, np.float32(3))
    assert "BatchSource" in str(caught.value)


def test_an_iterator_is_no_data_of_a_run_that_may_resume(tmp_path, step):
    with pytest.raises(sk.errors.DataError, match=r"data: map +is an iterator(.|\n)*__iter__"):
        trainer(tmp_path / "run", step, map(batch_of, range(STEPS))).run()
    assert not (tmp_path / "run").exists()


def test_an_object_with_one_iterator_for_all_its_uses_is_no_data_of_a_run_that_may_resume(
    tmp_path, step
):
    class Once:
        def __init__(self):
            self.batches = (batch_of(i) for i in range(2 * STEPS))

        def __iter__(self):
            return self.batches

    with pytest.raises(sk.errors.DataError, match=r"data: Once +gives the same generator each"):
        trainer(tmp_path / "run", step, Once()).run()
    never = sk.TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=0)
    trainer(tmp_path / "never", step, Once(), config=never).run()


def test_data_without_a_batch_is_told_with_a_fix_that_is_valid(tmp_path, step):
    with pytest.raises(sk.errors.DataError, match=r"gave 0 batches .*\nFix: data that yields"):
        trainer(tmp_path / "run", step, data=[]).run()


def test_a_step_may_be_compiled_once_everything_else_is_right(tmp_path, step):
    compiled = []

    def compiling():
        compiled.append(1)
        return step

    config = sk.TrainConfig(steps=STEPS, resume=str(tmp_path / "nowhere"))
    with pytest.raises(sk.errors.CheckpointError, match="is not a run folder"):
        trainer(tmp_path / "run", compiling, config=config).run()
    assert compiled == []
    out = io.StringIO()
    trainer(tmp_path / "run", compiling, out=out).run()
    assert compiled == [1]
    assert "compiled in 0.0 s" in out.getvalue()
    assert "compile" in read_metrics(tmp_path / "run")[0]["seconds"]


def test_a_record_that_changed_begins_a_new_run_and_is_named(tmp_path, step):
    stop = at_read(5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", step, record={"lr": 0.01, "mesh": "a"}, callbacks=[stop]).run()
    again = Noting(("on_start", 4), interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(
            tmp_path / "run",
            step,
            record={"lr": 0.01, "mesh": "b"},
            decides=("lr",),
            callbacks=[again],
        ).run()
    assert again.run.folder == tmp_path / "run"
    anew, out = Noting(), io.StringIO()
    trainer(tmp_path / "run", step, record={"lr": 0.02}, out=out, callbacks=[anew]).run()
    assert anew.run.folder == tmp_path / "run-2"
    assert "lr was 0.01, is 0.02; mesh was 'a', is None" in out.getvalue().replace("\n", " ")


def test_a_callback_may_end_the_run_in_order(tmp_path, step, by_hand):
    early = at_read(3, lambda self: self.run.stop("good enough"))
    state = trainer(tmp_path / "run", step, callbacks=[early]).run()
    assert int(state.step) == 4  # 3 is read while 4 is under way
    assert early.told[-3:] == [("on_save", 4), ("on_finish", 4), ("on_exit", type(None))]
    assert sk.Checkpointer(tmp_path / "run" / "checkpoints").steps()[-1] == 4
    ended = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "ended"]
    assert [row["why"] for row in ended] == ["good enough"]


def test_ctrl_c_behind_the_last_update_is_obeyed_before_the_run_is_scored(tmp_path, step):
    def press(callback):
        os.kill(os.getpid(), signal.SIGINT)

    noted = at_read(STEPS, press)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer(tmp_path / "run", step, callbacks=[noted]).run()
    assert f"Step {STEPS} is saved." in stopped.value.__notes__[0]
    assert noted.told[-1] == ("on_exit", KeyboardInterrupt)
    again = Noting()
    trainer(tmp_path / "run", step, callbacks=[again]).run()
    assert [event for event, _ in again.told] == ["on_start", "on_finish", "on_exit"]


@pytest.mark.parametrize(("which", "kind"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Stopped)])
@pytest.mark.parametrize("at", [3, STEPS, "finish"])  # of two evaluations, the second is the last
def test_a_signal_is_not_held_up_by_what_scores_the_state(at, which, kind, tmp_path, step):
    def send(*_):
        signal.raise_signal(signal.Signals[which])

    def evaluate(step, state):
        if int(state.step) == at:
            send()
            pytest.fail("it was scored")
        return {"error": float(step.evaluate(state, batch_of(0))["error"])}

    callback, done = Noting(("on_finish", STEPS), send), STEPS if at == "finish" else at
    callbacks = [callback] if at == "finish" else []
    with pytest.raises(kind) as stopped:
        trainer(tmp_path / "run", step, evaluate=evaluate, callbacks=callbacks).run()
    said = f"Step {done} is saved. Rerun the same command to resume."
    assert stopped.value.__notes__[0] == said
    assert sk.Checkpointer(tmp_path / "run" / "checkpoints").steps()[-1] == done

    at, again = None, Noting()
    trainer(tmp_path / "run", step, evaluate=evaluate, callbacks=[again]).run()
    assert again.told[0] == ("on_start", done)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, STEPS]
    assert losses(tmp_path / "run").keys() == set(range(1, STEPS + 1))


def test_ctrl_c_is_not_held_up_by_a_check_before_the_first_update(tmp_path, step):
    class Check(sk.Callback):
        def on_batch(self, step, state, batch):
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it was not interrupted")

    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer(tmp_path / "run", step, callbacks=[Check()]).run()
    assert stopped.value.__notes__[0].startswith("No checkpoint was saved. Rerun the same command")


def test_what_a_callback_raises_ends_the_run_and_every_callback_is_told(tmp_path, step):
    def fail(self):
        self.run.write("mine", step=2, why="because")
        raise RuntimeError("I do not like it")

    first, second = Noting(), at_read(2, fail)
    with pytest.raises(RuntimeError, match="I do not like it") as error:
        trainer(tmp_path / "run", step, callbacks=[first, second]).run()
    assert first.told[-1] == second.told[-1] == ("on_exit", RuntimeError)
    rows = read_metrics(tmp_path / "run")
    assert [row["kind"] for row in rows[-3:]] == ["mine", "stopped", "goodput"]
    assert rows[-2]["why"] == "I do not like it"
    assert error.value.__notes__ == [f"Metrics so far are in {tmp_path}/run/metrics.jsonl."]


def test_mfu_is_told_where_the_devices_are_in_a_table(tmp_path, step, monkeypatch):
    monkeypatch.setattr(_throughput, "identify_chip", lambda kind: CHIPS["h100"])
    out = io.StringIO()
    trainer(tmp_path / "run", step, out=out).run()
    told = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    # Forward, and back to the weights: two products of [8, 8] and [8, 4].
    flops, peak = 2 * (2 * 8 * 8 * 4), 8 * CHIPS["h100"].flops["f32"]
    for row in told:
        assert row["mfu"] == pytest.approx(flops / row["seconds"] / peak)
        assert row["rows_per_second"] == pytest.approx(8 / row["seconds"])
    assert "MFU 0.0%" in out.getvalue()


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path, step, by_hand):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(trainer(tmp_path / "run", step).run()), daemon=True
    )
    thread.start()
    thread.join(60)
    assert int(done[0].step) == STEPS
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
