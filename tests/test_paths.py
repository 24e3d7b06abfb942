"""A URL is refused wherever a path is taken, and `~` is the home."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.config import load_config
from shardkit.lm import TextTrainConfig
from shardkit.report.time._profile import read_profile
from shardkit.run import plot_runs, read_history
from shardkit.run._history import read_histories
from shardkit.step._program_cache import ProgramCache

BATCH = {"x": np.ones((8, 4), np.float32)}


def one_device():
    return sk.MeshSpec(data=1).build(devices=jax.devices()[:1])


def tiny_step():
    return sk.compile_step(
        lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2),
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, 2))},
        batch=BATCH,
        mesh=one_device(),
        strategy=sk.strategies.data(),
    )


URLS = ["s3://bucket/run", "gs://b", "file:///tmp/x", "hdfs://n:1/x"]


@pytest.mark.parametrize("url", [*URLS, "", "a" * 256, "\ud800"])
@pytest.mark.parametrize(
    "use",
    [
        lambda url: sk.Checkpointer(url),
        lambda url: sk.TrainConfig(resume=url),
        lambda url: sk.data.DataConfig(path=url),
        lambda url: sk.data.DataConfig(tokenizer=url),
        lambda url: sk.data.write_tokens(url, [[1]], 2),
        lambda url: sk.data.open_shards([url]),
        lambda url: sk.data.tokenize(".", url),
        lambda url: read_histories([Path(url or "s3://x")]),
        lambda url: sk.checkpoint.export_safetensors(url, {}),
        lambda url: sk.checkpoint.import_safetensors(url, {}),
        lambda url: sk.hf.decoder_config(url),
        lambda url: sk.hf.save(url, {}, like="like"),
        lambda url: sk.hf.save("out", {}, like=url),
        lambda url: sk.hf.load(url, tiny_step().spec, one_device()),
        lambda url: sk.Trainer(lambda: None, [], url),
        lambda url: read_history(url),
        lambda url: TextTrainConfig(out=url or "s3://x"),
        lambda url: sk.load_step(url, None),
        lambda url: ProgramCache.at(url, one_device()),
        lambda url: read_profile(url, ()),
        lambda url: plot_runs([Path(url or "s3://x")], Path("curve.png")),
        lambda url: plot_runs([Path("runs")], Path(url or "s3://x")),
        lambda url: load_config(url),
    ],
)
def test_what_is_no_path_is_refused_and_nothing_is_made(use, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sk.ShardkitError, match=r"is a URL|is empty|no file has|name too long"):
        use(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "train nano --set train.out=URL",
        "train nano --set train.resume=URL",
        "train nano --set data.path=URL",
        "train nano --set data.tokenizer=URL",
        "train nano --set compile.cache=URL",
        "train URL.py",
        "report nano --json URL",
        "report nano --html URL",
        "report URL.json URL.json",
        "plan nano --target tpu:v5p:2x2x1 --json URL",
        "plan nano --target tpu:v5p:2x2x1 --plot URL",
        "sweep nano --devices 8 --out URL",
        "plot URL",
        "plot runs/a --out URL.png",
        "init URL",
        "checkpoint inspect URL",
        "replay URL",
        "convert URL out",
        "convert in URL --like like",
        "tokenize . URL",
        "tokenize URL out",
        "shards URL",
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run"])
def test_a_command_refuses_a_url_and_makes_nothing(words, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("URL", url).split()) == 2
    errors = capsys.readouterr().err
    assert f"is a URL ({url[:2]}), not a path of a file system of this machine" in errors
    assert f"mount it, and give the path: /mnt/{url.partition('://')[2]}" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_home_is_expanded_wherever_a_path_is_taken(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "text", here):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for i in range(40):
        (home / "text" / f"{i}.txt").write_text(f"to be or not to be {i}\n" * 20)
    (home / "mine.py").write_text("import shardkit as sk\ndef config(): return sk.Config()\n")

    sk.Checkpointer("~/kept").save(1, {"w": jnp.zeros(1)})
    sk.data.write_tokens("~/one.bin", [[1]], 2)
    sk.data.open_shards(["~/one.bin"])
    sk.checkpoint.export_safetensors("~/w.safetensors", {"w": jnp.zeros(1)})
    step = tiny_step()
    step.save("~/a.step")
    assert sk.load_step("~/a.step", step.spec).mesh == step.mesh
    step.report(chip="v5p").to_trace("~/trace.json")
    trained = sk.Trainer(step, lambda i: BATCH, "~/run", sk.TrainConfig(steps=2, check="off"))
    trained.run()
    assert read_history("~/run").column("loss").steps
    report = step.report().to_json()
    (home / "report.json").write_text(report)
    for words in (
        "checkpoint inspect ~/kept",
        "checkpoint verify ~/run",
        "tokenize ~/text ~/tokens",
        "shards ~/tokens",
        "init ~/configs",
        "config show ~/mine.py",
        "report ~/report.json ~/report.json",
        "plot ~/run --out ~/curve.png",
    ):
        assert main(words.split()) == 0, capsys.readouterr().err
    made = "kept/step-00000001 w.safetensors a.step trace.json run configs/nano.py curve.png"
    assert [name for name in made.split() if not (home / name).exists()] == []
    settings = load_config(None, ["data.path=~/text", "data.seq_len=8"]).data
    assert "files" in sk.data.load_text(settings, 256).describe()
    assert not list(here.glob("~*"))
