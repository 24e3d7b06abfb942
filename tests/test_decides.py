"""What decides the numbers of a run is compared: between processes, and when it resumes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.run import _facts

from .test_trainer import at_read, interrupt

ROOT = Path(__file__).parent.parent


def compiled(rate=0.1, scale=1.0, n=8, first=1.0, **options):
    return sk.compile_step(
        lambda params, batch, key: scale * jnp.mean((batch["x"] @ params["w"]) ** 2),
        optax.adam(rate),
        init=lambda key: {"w": first + jax.random.normal(key, (4, 4))},
        batch={"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        mesh=sk.MeshSpec(data=n).build(devices=jax.devices()[:n]),
        **{"strategy": sk.strategies.data(), **options},
    )


def train(folder, step, ends_at=None, data=None, **config):
    trainer = sk.Trainer(
        step,
        data or (lambda i: {"x": np.random.default_rng(i).normal(size=(8, 4)).astype("f")}),
        folder / "run",
        sk.TrainConfig(**{"steps": 4, "checkpoint_every": 2, "check": "off", **config}),
        callbacks=[at_read(ends_at, interrupt)] if ends_at else [],
    )
    return trainer.run()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that ended behind its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        train(folder, compiled(), ends_at=3)
    return folder


def runs(folder):
    return sorted(path.name for path in folder.iterdir())


CHANGES = {
    "optimizer": lambda: dict(step=compiled(rate=0.2)),
    "loss": lambda: dict(step=compiled(scale=2.0)),
    "seed": lambda: dict(step=compiled(), seed=1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_resumes_with_what_decided_it_or_with_what_is_accepted(name, begun):
    changed = {"folder": begun, **CHANGES[name]()}
    with pytest.raises(sk.errors.CheckpointError) as error:
        train(**changed, resume=str(begun / "run"))
    assert f"  {name}  was " in str(error.value)
    assert f"--set train.resume_with={name} to resume with them" in str(error.value)
    with pytest.raises(KeyboardInterrupt):
        train(**changed, resume=str(begun / "run"), resume_with=(name,), ends_at=3)
    assert runs(begun) == ["run"]


def test_another_program_begins_a_new_run_where_none_is_named(begun, capsys):
    train(begun, compiled(rate=0.3))
    assert runs(begun) == ["run", "run-2"]
    assert "run has other settings (optimizer was '" in capsys.readouterr().out.replace("\n", "")


def test_another_mesh_and_another_start_are_no_other_run(begun):
    with pytest.raises(KeyboardInterrupt):
        train(begun, compiled(n=4, first=2.0), ends_at=3, resume=str(begun / "run"))


def test_other_software_is_told_when_a_run_resumes(begun, tmp_path, capsys, monkeypatch):
    shutil.copytree(begun / "run", tmp_path / "run")
    monkeypatch.setenv(
        "XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true"
    )
    monkeypatch.setattr(_facts, "package_versions", lambda: {"jax": "9.9"})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, compiled(), ends_at=3)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"versions.jax was '{jax.__version__}', is '9.9'" in said
    assert "--xla_cpu_enable_fast_math=true'" in said
    assert said.count("Other software than in the checkpoint") == 1


def test_other_options_of_the_compiler_are_told_when_a_run_resumes(begun, tmp_path, capsys):
    shutil.copytree(begun / "run", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, compiled(compiler_options={"xla_cpu_enable_fast_math": True}), ends_at=3)
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("compiler_options.xla_cpu_enable_fast_math was None, is 'True'") == 1


def test_gradients_that_are_rounded_otherwise_are_another_run(tmp_path):
    def rounded(block):
        rounding = sk.GradientCompression("data", block=block)
        strategy = dataclasses.replace(sk.strategies.data(), compression=rounding)
        return compiled(strategy=strategy, mode="shard_map")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, rounded(256), ends_at=3)
    with pytest.raises(sk.errors.CheckpointError, match=r"compression\.block  was 256, is 8"):
        train(tmp_path, rounded(8), resume=str(tmp_path / "run"))


def test_the_loss_of_shards_decides_too(tmp_path):
    def on_shards(scale, n=8):
        def reference(params, batch, key):
            return jnp.mean((batch["x"] @ params["w"]) ** 2)

        def local(params, batch, key):
            return scale * jax.lax.pmean(reference(params, batch, key), "data")

        return declared(n, loss_fn=sk.ShardMapLoss(local, reference), mode="shard_map")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_shards(1.0), ends_at=3)
    with pytest.raises(sk.errors.CheckpointError, match="loss  was "):
        train(tmp_path, on_shards(2.0), resume=str(tmp_path / "run"))
    assert int(train(tmp_path, on_shards(1.0, n=4)).step) == 4
    assert runs(tmp_path) == ["run"]


def constrained(n, mesh=None):
    sharding = jax.sharding.NamedSharding(mesh, P("data")) if mesh else P("data")

    def loss(params, batch, key):
        y = jax.lax.with_sharding_constraint(batch["x"] @ params["w"], sharding)
        return jnp.mean(y**2)

    return declared(n, loss_fn=loss)


def declared(n, **changes):
    step = compiled(n=n)
    return sk.compile_step(**{**step.spec.replace(**changes).__dict__, "mesh": step.mesh})


# Steps that know more than a loss of arrays and an optimizer of gradients.
DECLARED = {
    "lbfgs": lambda n: declared(n, optimizer=optax.lbfgs(memory_size=2)),
    "line search": lambda n: declared(
        n,
        optimizer=optax.chain(
            optax.sgd(0.1), optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
        ),
    ),
    "frozen": lambda n: declared(
        n,
        init=lambda key: {"w": jax.random.normal(key, (4, 4)), "base": jnp.ones((3,))},
        trainable="w",
    ),
    "constrained": constrained,
    "constrained on its mesh": lambda n: constrained(n, compiled(n=n).mesh),
}


@pytest.mark.parametrize("name", DECLARED)
def test_every_step_runs_and_resumes_on_another_mesh(name, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, DECLARED[name](8), ends_at=3)
    assert int(train(tmp_path, DECLARED[name](4)).step) == 4
    assert "Starting a new run" not in capsys.readouterr().out
    assert runs(tmp_path) == ["run"]


def test_a_name_that_is_no_setting_is_told(begun):
    with pytest.raises(sk.errors.ConfigError, match="Did you mean 'optimizer'"):
        train(begun, compiled(), resume_with=("optimiser",))


FAULTS = {
    "seed": "train.seed  process 0: 0; process 1: 1",
    "steps": "train.steps  process 0: 3; process 1: 4",
    "checkpoint_every": "train.checkpoint_every  process 0: 2; process 1: 1",
    "eval_every": "train.eval_every  process 0: 0; process 1: 1",
    "flag": "flags.jax_threefry_partitionable  process 0: 'True'; process 1: 'False'",
    "compiler": "environment.jax_disable_most_optimizations  process 0: 'False'; process 1: 'True'",
    "environment": "environment.NVIDIA_TF32_OVERRIDE  process 0: '0'; process 1: '1'",
    "record": "record.model.size  process 0: 0; process 1: 1",
    "init": "init  process 0: '",
    "loss": "loss     process 0: '",
    "rate": "optimizer  process 0: '",
    "devices": "devices  process 0: [0, ",
    "compiler_options": "compiler_options.xla_cpu_enable_fast_math  process 0: 'False'; process 1:",
    "given": "given.params/w  process 0: '",
    "batch": "batch/c f32[8,4]  on cpu",  # the last: it ends the processes
}


@pytest.mark.slow
def test_disagreements_of_two_processes_are_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SHARDKIT_COORDINATOR_HOST", "127.0.0.1")
    main = "import sys; from shardkit.cli import main; sys.exit(main(sys.argv[1:]))"
    launch = [sys.executable, "-c", main, "launch", "-n", "2", "--devices", "4", "--"]
    program = [sys.executable, "-m", "tests._disagreeing", str(tmp_path), "none", *FAULTS]
    ended = subprocess.run([*launch, *program], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    said = {row["fault"]: row["said"] for row in map(json.loads, lines)}
    assert said.pop("none") == "agreed", ended.stderr
    assert said.keys() == FAULTS.keys()
    for fault, expected in FAULTS.items():
        assert expected in said[fault], said[fault]
    rows = (tmp_path / "batch" / "metrics.jsonl").read_text()
    assert '"kind": "step"' not in rows
