"""Ten tasks of a newcomer, each solved by what a page of docs/ says, typed as it stands there.

A task has a model, data or wish of its own. What it types is the page's code with those in the
place of the page's, and the answer is compared with one that is computed by hand.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

ROOT = Path(__file__).parent.parent
ROWS = {name: np.random.default_rng(0).normal(size=(32, 16)).astype("f") for name in ("x", "y")}


def blocks(page):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def typed(code, mine=None, names=None):
    """Runs code of a page, with my text in the place of the page's; returns its names."""
    for theirs, text in (mine or {}).items():
        assert code.count(theirs) == 1, f"{theirs!r} is {code.count(theirs)} times on the page"
        code = code.replace(theirs, text)
    names = {} if names is None else names
    exec(compile(code, "page.py", "exec"), names)
    return names


def by_hand(loss, params, optimizer, batches):
    """Losses and parameters of plain JAX on one device."""
    params = jax.device_get(params)
    state, losses = optimizer.init(params), []
    for batch in batches:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses, params


def residual(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["up"])
    return jnp.mean((batch["x"] + hidden @ params["down"] - batch["y"]) ** 2)


def residual_init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (16, 64)) / 4,
        "down": jax.random.normal(down, (64, 16)) / 8,
    }


MINE = {"residual": residual, "residual_init": residual_init, "ROWS": ROWS, "P": P}


class Gated(nnx.Module):
    """My nnx model: a gated block, with the names that the page asks for."""

    def __init__(self, rngs):
        named, draw = nnx.with_partitioning, nnx.initializers.lecun_normal()
        columns = {"kernel_init": named(draw, ("embed", "mlp")), "use_bias": False}
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 64, **columns, rngs=rngs)
        self.gate = nnx.Linear(16, 64, **columns, rngs=rngs)
        self.down = nnx.Linear(64, 8, kernel_init=named(draw, ("mlp", None)), rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def test_1_train_my_nnx_model_on_2_x_4():
    code = blocks("model/nnx.md")[0]
    page = typed(code, {"lambda rngs: Net(rngs)": "lambda rngs: Gated(rngs)"}, {"Gated": Gated})
    assert dict(page["step"].mesh.shape) == {"data": 2, "tensor": 4}
    start = jax.device_get(page["step"].init(jax.random.key(0)))
    graph, values = nnx.split(page["model"].bind(start.params, start.model_state))

    def loss(values, batch):
        return jnp.mean((nnx.merge(graph, values)(batch["x"]) - batch["y"]) ** 2)

    batches = [page["batch"]] * 2
    losses, _ = by_hand(loss, values, optax.adamw(1e-2), batches)
    np.testing.assert_allclose(float(page["metrics"]["loss"]), losses[0], rtol=1e-5)
    _, metrics = page["step"](page["state"], page["batch"])
    np.testing.assert_allclose(float(metrics["loss"]), losses[1], rtol=1e-5)


def test_2_find_why_memory_is_high():
    code = blocks("report/read.md")[0]
    rules = '{"up": P(None, "tensor"), "down": P("tensor")}'
    loss = 'jnp.mean((hidden @ params["down"]) ** 2)'
    mine = {
        loss: loss.replace('["down"])', '["down"] + params["table"].mean(0))'),
        'init=lambda key: {"up"': 'init=lambda key: {"table": jnp.ones((4096, 64)), "up"',
        rules: rules.replace("}", ', "table": sk.REPLICATED}'),
    }
    page = typed(code, mine)
    step, memory = page["step"], page["report"].memory
    # "Out of memory", 1: which class is large? 2: which leaf is it, and which rule decides it?
    assert memory.params > 4096 * 64 * 4
    assert memory.opt_state > 2 * 4096 * 64 * 4
    (told,) = re.findall(r"`(sk\.explain_rules\(.*?\))`", (ROOT / "docs" / "wrong.md").read_text())
    names = {"sk": sk, "step": step, "strategy": step.spec.strategy, "mesh": step.mesh}
    text = str(eval(told, names))
    assert re.search(r"^table +f32\[4096,64\] +P\(\) +1\.00 MiB +R(\d)$", text, re.M)
    mine[rules] = rules.replace("}", ', "table": P(("data", "tensor"))}')
    split = typed(code, mine)["report"]
    assert memory.params - split.memory.params == 4096 * 64 * 4 * 7 // 8


def test_3_resume_on_another_mesh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    declare, resume = blocks("run/checkpoints.md")[:2]
    mine = {
        'jnp.mean((batch["x"] @ params["w"]) ** 2)': "residual(params, batch)",
        'init=lambda key: {"w": jax.random.normal(key, (16, 32))}': "init=residual_init",
        'batch={"x": np.ones((8, 16), "f")}': "batch=ROWS",
        '{"w": P("fsdp")}': '{"*": P("fsdp")}',
        'jax.random.key(0)), {"x": np.ones((8, 16), "f")})': "jax.random.key(0)), ROWS)",
    }
    page = typed(declare, mine, dict(MINE))
    leaf = 'np.asarray(restored.state.params["w"]), np.asarray(state.params["w"])'
    typed(resume, {leaf: leaf.replace('"w"', '"down"')}, page)
    assert page["other"].mesh.size == 4
    state, metrics = page["other"](page["restored"].state, ROWS)
    start = page["step"].init(jax.random.key(0)).params
    losses, params = by_hand(residual, start, optax.adam(1e-2), [ROWS] * 2)
    np.testing.assert_allclose(float(metrics["loss"]), losses[1], rtol=1e-5)
    np.testing.assert_allclose(state.params["up"], params["up"], rtol=1e-4, atol=1e-6)


def test_4_use_my_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays, loader, own = blocks("run/data.md")
    table = np.random.default_rng(7).normal(size=(300, 9)).astype("f")
    np.save("measurements.npy", table)
    page = typed(loader, names=typed(arrays))
    state, at = page["state"], int(page["state"].step)
    start = jax.device_get(state.params)
    mine = {
        'np.save("mine.npy", np.random.rand(500, 9).astype("f"))\n': "",
        'Files("mine.npy")': 'Files("measurements.npy")',
    }
    typed(own, mine, page)

    def loss(params, batch):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    chosen = [np.random.default_rng(i).integers(300, size=64) for i in range(at, at + 10)]
    batches = [{"x": table[rows, :8], "y": table[rows, 8]} for rows in chosen]
    losses, params = by_hand(loss, start, optax.sgd(0.1), batches)
    np.testing.assert_allclose(page["state"].params["w"], params["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(float(page["metrics"]["loss"]), losses[-1], rtol=1e-4)


ASSERTIONS = {
    'jnp.mean((batch["x"] @ params["w"]) ** 2)': "residual(params, batch)",
    'init=lambda key: {"w": jax.random.normal(key, (16, 32))}': "init=residual_init",
    'batch={"x": np.ones((8, 16), "f")}': "batch=ROWS",
}


@pytest.mark.slow
def test_5_prove_parity_in_my_tests(tmp_path):
    text = (ROOT / "docs" / "prove" / "tests.md").read_text()
    (plugin,) = re.findall(r"^```text\n(@pytest.mark.devices.*?)^```$", text, re.M | re.S)
    code = blocks("prove/tests.md")[0].split("step = spec.compile")[0]
    code = code.replace("sk.simulate_devices(8)\n", "")  # the marker gives the devices
    for theirs, mine in ASSERTIONS.items():
        assert code.count(theirs) == 1
        code = code.replace(theirs, mine)
    body = "".join(f"    {line}\n" if line else "\n" for line in code.splitlines())
    assert plugin.count("    ...\n") == 1
    test = plugin.replace("    ...\n", body)
    (tmp_path / "test_mine.py").write_text(
        f"import pytest\nfrom tests.test_ten_tasks import ROWS, residual, residual_init\n{test}"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "shardkit.testing._plugin"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # installed or not, the plugin is the one named
        },
        capture_output=True,
        text=True,
    )
    assert "1 passed" in run.stdout, run.stdout + run.stderr


def test_6_choose_a_mesh_for_16_gpus():
    code = blocks("choose/plan.md")[0]
    page = typed(code, {'"tpu:v5p:2x2x1"': '"gpu:h100:2x8"', "print(plan)": "shown = str(plan)"})
    first = re.search(r"^mesh = sk\.MeshSpec\((.*)\)$", page["shown"], re.M)
    assert first
    sizes = dict(part.split("=") for part in first[1].split(", "))
    assert math.prod(map(int, sizes.values())) == 16
    # Weights, gradients and two moments in f32, on as many devices as the mesh splits them over.
    best = page["plan"].rows[0]
    assert str(best).startswith(first[1].split(", ")[0])
    whole = 4 * 4 * 2 * 1024 * 4096
    (mib,) = re.findall(r"([\d.]+) MiB", str(best))
    assert whole / 16 < float(mib) * 2**20 < whole + 4096 * (1024 + 4096) * 4


class Plain(nn.Module):
    """My linen model, without names."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(64, use_bias=False)(nn.LayerNorm(use_bias=False, use_scale=False)(x))
        return x[:, :8] + nn.Dense(8, use_bias=False)(jnp.tanh(h))


class Named(nn.Module):
    """The same, with what the page does to its own."""

    @nn.compact
    def __call__(self, x, train=False):
        named, init = nn.with_logical_partitioning, nn.initializers.lecun_normal()
        h = nn.LayerNorm(use_bias=False, use_scale=False)(x)
        h = nn.Dense(64, use_bias=False, kernel_init=named(init, ("embed", "mlp")))(h)
        h = nn.with_logical_constraint(jnp.tanh(h), ("batch", "mlp"))
        dense = nn.Dense(8, use_bias=False, kernel_init=named(init, ("mlp", "embed")))
        return x[:, :8] + dense(h)


def test_7_add_logical_names_to_a_linen_model():
    code = blocks("model/linen.md")[0]
    with pytest.raises(sk.ShardkitError, match="Dense_0/kernel"):  # which have no names
        typed(code, {"    Net(), lambda": "    Plain(), lambda"}, {"Plain": Plain})
    page = typed(code, {"    Net(), lambda": "    Named(), lambda"}, {"Named": Named})
    start = page["step"].init(jax.random.key(0)).params

    def loss(params, batch):
        return jnp.mean((Plain().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)

    losses, _ = by_hand(loss, start, optax.adamw(1e-2), [page["batch"]])
    np.testing.assert_allclose(float(page["metrics"]["loss"]), losses[0], rtol=1e-5)


@pytest.mark.slow
def test_8_low_rank_adapters_on_a_hugging_face_folder(tmp_path, monkeypatch):
    from safetensors.numpy import load_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    code = "import jax, optax, shardkit as sk\n" + blocks("lora.md")[1]
    page = typed(
        code,
        {
            'folder = "tests/data/hf/llama"': 'folder = "tests/data/hf/qwen3"',
            '{"layers/query": 4, "layers/value": 4}': '{"layers/up": 2}',
        },
        {"mesh": sk.MeshSpec(fsdp=4).build(devices=jax.devices()[:4])},
    )
    assert [list(page["state"].params["lora"]["layers"])] == [["up"]]
    before, after = (
        load_file(path / "model.safetensors")
        for path in (ROOT / "tests" / "data" / "hf" / "qwen3", tmp_path / "llama-merged")
    )
    changed = {name for name, x in after.items() if not np.array_equal(x, before[name])}
    assert after.keys() == before.keys()
    assert changed == {name for name in before if "up_proj" in name}


def test_9_a_budget_in_ci():
    code = blocks("prove/tests.md")[0]
    typed(code, ASSERTIONS, dict(MINE))
    # The change that breaks it: gradients are reduced in every micro-batch.
    changed = "strategy=sk.strategies.data(), accumulate=sk.Accumulate(4, reduce='every'),"
    mine = {**ASSERTIONS, "strategy=sk.strategies.data(),": changed}
    mine['assert_collectives(step, {("data", "all-reduce"): 1})\n'] = ""
    with pytest.raises(sk.errors.BudgetError, match=r"reductions_per_step.*data"):
        typed(code, mine, dict(MINE))


def test_10_what_to_do_when_the_loss_is_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    skip, replay = blocks("run/watch.md")
    page = typed(skip)
    loss = "lambda params, batch, key: jnp.mean(jnp.sqrt(batch['x'] @ params['w']))"
    text = f'def mine(step):\n    return step.replace(loss_fn={loss}, on_nonfinite="stop")\n'
    names = typed(text, names={"jnp": jnp})
    page["step"] = names["mine"](page["step"])
    mine = {
        'step = step.replace(on_nonfinite="stop")\n': "",
        "sk.TrainConfig(steps=10)": 'sk.TrainConfig(steps=10, check="off")',
        'assert "log" in str(found.origin)\n': "",
    }
    typed(replay, mine, page)
    lines = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert max(row["step"] for row in rows if row["kind"] == "step") == 4
    assert page["found"].reproduced
    assert re.fullmatch(r"sqrt \(page\.py:2\)", str(page["found"].origin))
