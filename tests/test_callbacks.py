"""Runs whose metrics go wrong: skipped and counted, stopped with a dump, copies that differ."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import shardkit as sk
from shardkit.cli import main
from shardkit.run import TrainConfig
from shardkit.run.callbacks import Callback
from shardkit.run.guards import read_dump

from . import _checkpoints as ck
from .test_guards import flipped

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 8, 4)).astype(np.float32)
BAD_AT = 5  # the batch of update 6
POISONED = X.copy()
POISONED[BAD_AT, 3, 2] = np.inf
CONFIG = TrainConfig(steps=9, eval_every=0, checkpoint_every=4, log_every=1)


def init(key):
    return {"w": jax.random.normal(key, (4, 4)), "b": jnp.zeros(4)}


def loss_fn(params, batch, key):
    with jax.named_scope("model"):
        h = jnp.tanh(batch["x"] @ params["w"]) + params["b"]
        noise = 0.1 * jax.random.normal(key, h.shape)
        # Has no slope where a batch is all zero.
        root = jnp.sqrt(jnp.square(batch["x"] * params["w"].sum()).sum())
        return jnp.mean(jnp.square(h - batch["x"] + noise)) + 0.01 * root


def compiled(how, devices=8):
    return sk.compile_step(
        loss_fn,
        optax.adam(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        mesh=sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices]),
        strategy=sk.Strategy(params=sk.PathRules({"**": sk.REPLICATED}), batch=P("data")),
        on_nonfinite=how,
    )


@pytest.fixture(scope="module")
def steps():
    return {how: compiled(how) for how in ("apply", "skip", "stop")}


def train(folder, step, data=POISONED, callbacks=(), **config):
    out = io.StringIO()
    loop = CONFIG if not config else TrainConfig(**{**vars(CONFIG), **config})
    trainer = sk.Trainer(
        step,
        lambda i: {"x": data[i]},
        folder,
        loop,
        callbacks=callbacks,
        record={"model": "tanh"},
        console=Console(file=out, width=300),
    )
    return trainer.run, out


def rows(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def test_a_run_that_skips_goes_on_and_counts(steps, tmp_path):
    run, out = train(tmp_path / "run", steps["skip"])
    state = run()
    (one,) = rows(tmp_path / "run", "skipped")
    assert (one["step"], one["in_row"], one["values"]["loss"]) == (6, 1, "inf")
    assert [row["skipped"] for row in rows(tmp_path / "run", "step")] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    said = out.getvalue()
    assert "step 6 skipped: loss inf" in said
    assert "1 of 9 updates were skipped: their loss or gradients were not finite." in said
    assert int(state.step) == 9
    assert np.isfinite(state.params["w"]).all()


def test_a_run_that_only_skips_ends(steps, tmp_path):
    data = X.copy()
    data[BAD_AT:, 0] = np.nan
    run, _ = train(tmp_path / "run", steps["skip"], data, skip_limit=3)
    with pytest.raises(sk.errors.StepError) as error:
        run()
    assert "step 8  and the 2 updates before it were not finite, and skipped" in str(error.value)
    assert "learning rate" in str(error.value)


def test_a_run_that_stops_keeps_what_it_failed_on_bit_for_bit(steps, tmp_path):
    kept = {}

    class KeepBits(Callback):
        def on_dispatch(self, step, state, batch):
            kept[step] = ck.bits(state)

    run, _ = train(tmp_path / "run", steps["stop"], callbacks=[KeepBits()])
    with pytest.raises(sk.errors.StepError) as error:
        run()
    dump = tmp_path / "run" / "dumps" / "step-00000006"
    assert f"its state and batch are in {dump}" in str(error.value)
    assert f"shardkit replay {dump}" in str(error.value)
    (row,) = rows(tmp_path / "run", "dumped")
    assert (row["step"], row["folder"]) == (6, str(dump))
    step = steps["stop"]
    back = read_dump(dump, step.abstract_state, step.layout.batch, step.shardings.step)
    assert (back.step, back.values["loss"], back.config) == (6, "inf", {"model": "tanh"})
    assert ck.bits(back.state) == kept[5]
    np.testing.assert_array_equal(back.batch["x"], POISONED[BAD_AT])


def test_a_dump_is_replayed_on_one_device(steps, tmp_path):
    data = X.copy()
    data[BAD_AT] = 0
    one = compiled("apply", devices=1)
    for name, which in (("batch", POISONED), ("step", data)):
        run, _ = train(tmp_path / name, steps["stop"], which)
        with pytest.raises(sk.errors.StepError):
            run()
        found = sk.replay(tmp_path / name, one)
        assert found.reproduced
        assert found.dump.values["grad_norm"] == str(found.metrics["grad_norm"]) == "nan"
        if name == "batch":
            assert (found.batch, found.origin) == ({"x f32[8,4]": 1}, None)
            assert "not finite first     in the input of the step" in str(found)
        else:
            assert (found.batch, found.params) == ({}, {})
            assert list(found.gradients) == ["w f32[4,4]"]
            assert (found.origin.operation, found.origin.scope) == ("div", "model")
            assert found.origin.source.startswith(__file__)
            assert "gradients            w f32[4,4]: 16 not finite" in str(found)


def test_what_is_no_dump_of_this_model_is_told(steps, tmp_path):
    run, _ = train(tmp_path / "run", steps["stop"])
    with pytest.raises(sk.errors.StepError):
        run()
    with pytest.raises(sk.errors.CheckpointError, match="is a checkpoint, not a dump"):
        sk.replay(tmp_path / "run" / "checkpoints", steps["stop"])
    with pytest.raises(
        sk.errors.CheckpointError, match=r"none  is not a folder\nFix: RUN/dumps/step-"
    ):
        sk.replay(tmp_path / "none", steps["stop"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(sk.errors.CheckpointError, match="empty  contains no dump"):
        sk.replay(tmp_path / "empty", steps["stop"])
    other = steps["apply"].replace(init=lambda key: {**init(key), "more": jnp.zeros(3)})
    with pytest.raises(
        sk.errors.CheckpointError, match=r"state/params/more +is f32\[3\] in the state"
    ):
        sk.replay(tmp_path / "run", other)


@pytest.mark.slow
def test_the_command_line_replays_what_its_run_left(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(bytes(range(97, 123)) * 60)
    sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "kv_heads": 2}
    words = [f"model.{name}={size}" for name, size in sizes.items()]
    words += ["data.path=text.txt", "data.validation_fraction=0.3"]
    words += [
        "data.seq_len=8",
        "optimizer.name=sgd",
        "optimizer.lr=1e25",
        "optimizer.grad_clip_norm=none",
    ]
    words += [
        "optimizer.warmup_fraction=0",
        "train.steps=6",
        "train.eval_every=0",
        "train.baselines=false",
    ]
    words += ["strategy=data", "mesh.tensor=1", "train.sample=0", "devices=cpu:8"]
    assert main(["train", *(part for word in words for part in ("--set", word))]) == 2
    said = capsys.readouterr().err
    assert "shardkit replay" in said, said
    (dump,) = (tmp_path / "runs" / "default" / "dumps").glob("step-*")
    assert f"shardkit replay {dump.relative_to(tmp_path)}" in said.replace("\n", "")
    assert main(["replay", str(dump)]) == 0
    shown = capsys.readouterr().out
    assert "batch                finite" in shown
    assert "not finite first     " in shown
    assert main(["replay", str(tmp_path / "runs" / "default" / "checkpoints")]) == 2


def test_the_error_of_a_step_that_applies_says_how_to_keep_more(steps, tmp_path):
    run, _ = train(tmp_path / "run", steps["apply"])
    with pytest.raises(
        sk.errors.StepError, match=r'step 6[\s\S]*compile_step\(on_nonfinite="stop"\)'
    ):
        run()
    assert not (tmp_path / "run" / "dumps").exists()


def test_a_spike_is_a_row_of_the_metrics(steps, tmp_path):
    data = np.concatenate([X, X])
    data[40] *= 30
    run, out = train(tmp_path / "run", steps["apply"], data, steps=50, checkpoint_every=0)
    run()
    found = rows(tmp_path / "run", "spike")
    assert [(row["step"], row["of"]) for row in found] == [(41, "loss"), (41, "grad_norm")]
    (loss,) = (row["loss"] for row in rows(tmp_path / "run", "step") if row["step"] == 41)
    assert found[0]["loss"] == loss > found[0]["limit"] > found[0]["expected"]
    assert found[0]["grad_norm"] > found[1]["limit"]
    assert "step 41: loss spikes to" in out.getvalue()


class FlipOnce(Callback):
    """Changes a bit of one device's copy, behind the back of the loop."""

    def __init__(self, at):
        self.at = at

    def on_dispatch(self, step, state, batch):
        if step == self.at:
            state.params["w"] = flipped(state.params["w"], jax.devices()[5])


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_bit_that_flips_on_one_device_is_found(then, steps, tmp_path):
    run, out = train(
        tmp_path / "run",
        steps["apply"],
        X,
        [FlipOnce(4)],
        replica_check_every=2,
        on_replica_mismatch=then,
    )
    if then == "stop":
        with pytest.raises(sk.errors.StateError) as error:
            run()
        text = str(error.value)
    else:
        run()
        text = out.getvalue()
    assert "Copies of the state differ at step 6; they agreed after step 4." in text
    assert "state/params/w f32[4,4]" in text
    assert f"on {jax.devices()[5]} at (data=5) has checksum" in text
    assert "most of 8 copies have" in text
    assert "a checkpoint no newer than step 4" in text
    row = rows(tmp_path / "run", "replicas")[0]
    assert row["step"] == 6
    assert {one["place"]["data"] for one in row["differ"]} == {5}


def test_two_runs_are_equal_bit_for_bit_and_so_is_one_that_was_ended(steps, tmp_path):
    step = steps["apply"].replace(deterministic=True)

    class End(Callback):
        def on_step(self, metrics):
            if metrics.step == 6:
                raise KeyboardInterrupt

    whole = [ck.bits(train(tmp_path / name, step, X)[0]()) for name in ("first", "second")]
    assert whole[0] == whole[1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "third", step, X, [End()])[0]()
    assert ck.bits(train(tmp_path / "third", step, X)[0]()) == whole[0]
    losses = [[row["loss"] for row in rows(tmp_path / n, "step")] for n in ("first", "third")]
    assert losses[0] == losses[1]
