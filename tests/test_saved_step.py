"""A step that starts from saved executables, and files that must not be used."""

import contextlib
import linecache
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import PartitionSpec as P

import shardkit as sk

X = np.linspace(-1, 1, 16 * 8, dtype="f").reshape(16, 8)
STRATEGY = sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data"))


def loss(p, b, key):
    return jnp.mean(jnp.tanh(b["x"] @ p["w"]) ** 2)


def init(key):
    return {"w": jax.random.normal(key, (8, 16))}


def make_spec(**changes):
    options = {"loss_fn": loss, "optimizer": optax.adam(0.1), "init": init, "batch": {"x": X}}
    return sk.StepSpec(**options | changes, strategy=STRATEGY)


def make_mesh(devices=slice(1), data=1):
    return sk.MeshSpec(data=data, tensor=-1).build(devices=jax.devices()[devices])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "step.saved"
    make_spec().compile(make_mesh()).save(path)
    return path


@pytest.fixture
def compiles():
    """Programs that JAX compiles from here on."""
    seen = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def losses_by_hand(steps=3, rate=0.1):
    """The losses of three adam steps and of an evaluation, in plain JAX on one device."""
    w = init(jax.random.key(0))["w"]
    optimizer = optax.adam(rate)
    state, seen = optimizer.init(w), []
    for _ in range(steps):
        value, gradient = jax.value_and_grad(lambda w: loss({"w": w}, {"x": X}, None))(w)
        updates, state = optimizer.update(gradient, state, w)
        w = optax.apply_updates(w, updates)
        seen.append(float(value))
    return [*seen, float(loss({"w": w}, {"x": X}, None))]


def losses_of(step, steps=3):
    state, seen = step.init(jax.random.key(0)), []
    for _ in range(steps):
        state, metrics = step(state, {"x": X})
        seen.append(float(metrics["loss"]))
    return [*seen, float(step.evaluate(state, {"x": X})["loss"])]


def test_a_loaded_step_compiles_nothing_and_is_the_same(saved, compiles):
    expected, _ = losses_by_hand(), jax.random.key(0)
    del compiles[:]
    step = sk.load_step(saved, make_spec())
    assert losses_of(step) == pytest.approx(expected, rel=1e-5)
    assert not compiles
    assert step.program.from_cache
    assert dict(step.mesh.shape) == {"data": 1, "tensor": 1}
    assert step.report().ledger == make_spec().compile(make_mesh()).report().ledger


def test_on_several_cpu_devices_a_saved_program_never_runs(tmp_path, compiles):
    """They wait for each other in different collectives: of five starts on two cores two hung."""
    path = tmp_path / "step.saved"
    make_spec().compile(make_mesh(slice(8), data=2)).save(path)
    del compiles[:]
    with pytest.warns(sk.SavedStepWarning, match="8 CPU devices  can deadlock") as told:
        step = sk.load_step(path, make_spec())
    assert [warning.filename for warning in told] == [__file__]
    assert compiles
    assert not step.program.from_cache
    assert dict(step.mesh.shape) == {"data": 2, "tensor": 4}
    assert losses_of(step) == pytest.approx(losses_by_hand(), rel=1e-5)


STALE = {
    "another loss": (dict(loss_fn=lambda p, b, k: 2 * loss(p, b, k)), "another program"),
    "another rate": (dict(optimizer=optax.adam(0.2)), "another program"),
    "another batch": (dict(batch={"x": X[:8]}), "another program"),
    "another option": (dict(on_nonfinite="skip"), "another program"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_step_of_another_program_compiles_and_says_so(saved, compiles, name):
    changes, why = STALE[name]
    with pytest.warns(sk.SavedStepWarning, match=why) as told:
        step = sk.load_step(saved, make_spec(**changes))
    assert {warning.filename for warning in told} == {__file__}
    assert compiles
    assert not step.program.from_cache


def test_other_flags_and_devices_are_named(saved, monkeypatch):
    with pytest.warns(sk.SavedStepWarning, match=r"devices +was '\[0\]', is '\[3\]'"):
        sk.load_step(saved, make_spec(), mesh=make_mesh(slice(3, 4)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    with pytest.warns(sk.SavedStepWarning, match="XLA_FLAGS +was .* is '--xla_cpu_enable_fast"):
        step = sk.load_step(saved, make_spec())
    assert losses_of(step) == pytest.approx(losses_by_hand(), rel=1e-5)


def damage(saved, path, where):
    """Flips one bit inside the member that `where` selects."""
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as file:
        member = next(m for m in file.infolist() if where(m))
        data[member.header_offset + 30 + len(member.filename) + member.file_size // 2] ^= 4
    path.write_bytes(data)
    return path


def test_damaged_programs_never_run(saved, tmp_path):
    largest = max(zipfile.ZipFile(saved).infolist(), key=lambda m: m.file_size).filename
    path = damage(saved, tmp_path / "flipped", lambda m: m.filename == largest)
    with pytest.warns(sk.SavedStepWarning, match="damaged"):
        losses = losses_of(sk.load_step(path, make_spec()))
    assert losses == pytest.approx(losses_by_hand(), rel=1e-5)


@pytest.mark.parametrize("cut", ["cut", "header", "text", "empty", "zip of others"])
def test_an_unreadable_file_needs_a_mesh_and_compiles(saved, tmp_path, cut):
    path = tmp_path / "step.saved"
    if cut == "header":
        damage(saved, path, lambda m: m.filename == "header.json")
    elif cut == "zip of others":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("header.json", "[1, 2]")
    else:
        data = saved.read_bytes()
        path.write_bytes({"cut": data[: len(data) // 2], "text": b"no zip", "empty": b""}[cut])
    with pytest.raises(sk.ShardkitError, match=r"is not a saved step(.|\n)*mesh="):
        sk.load_step(path, make_spec())
    with pytest.warns(sk.SavedStepWarning, match="is not a saved step"):
        step = sk.load_step(path, make_spec(), mesh=make_mesh())
    assert dict(step.mesh.shape) == {"data": 1, "tensor": 1}


def told(params, batch, key):
    jax.debug.print("loss {}", batch["x"][0, 0])
    return loss(params, batch, key)


def called(params, batch, key):
    seen = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), "float32"), batch["x"][0, 0])
    return loss(params, batch, key) + jax.lax.stop_gradient(seen)


@pytest.mark.parametrize("calls_python", [told, called])
def test_a_step_that_calls_python_cannot_be_saved(calls_python, tmp_path):
    step = make_spec(loss_fn=calls_python).compile(make_mesh())
    with pytest.raises(
        sk.errors.StepError, match=r"a loss without jax\.debug\.print and callbacks"
    ):
        step.save(tmp_path / "step.saved")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_missing_or_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(sk.ShardkitError, match=r"nothing\.saved +does not exist"):
        sk.load_step(tmp_path / "nothing.saved", make_spec(), mesh=make_mesh())
    step = make_spec().compile(make_mesh())
    with pytest.raises(sk.ShardkitError, match="The step cannot be saved"):
        step.save(tmp_path / "no folder" / "step.saved")
    with pytest.raises(sk.ShardkitError, match="The step cannot be saved"):
        step.save(tmp_path)
    assert not list(tmp_path.iterdir())


MODEL = """import jax.numpy as jnp


def loss(p, b, key):
    return jnp.mean(jnp.tanh(b["x"] @ p["w"]) ** 2)
"""


def load_model(path, text):
    """The loss of a file, which is written first; as after a restart, nothing of it is traced."""
    path.write_text(text)
    linecache.checkcache(str(path))
    namespace = {}
    exec(compile(text, str(path), "exec"), namespace)
    return namespace["loss"]


@pytest.mark.parametrize("cache", ["saved step", "JAX's"])
def test_a_line_is_where_it_is_now_whatever_a_cache_holds(tmp_path, compiles, cache):
    saved, model, mesh = tmp_path / "step.saved", tmp_path / "model.py", make_mesh()

    def compile_edited(text):
        spec = make_spec(loss_fn=load_model(model, text))
        return sk.load_step(saved, spec, mesh=mesh) if saved.exists() else spec.compile(mesh)

    with jax_cache(tmp_path / "cache" if cache == "JAX's" else None):
        first = compile_edited(MODEL)
        if cache == "saved step":
            first.save(saved)
        compile_edited(MODEL)  # builds what the second call builds besides
        del compiles[:]
        step = compile_edited("# One line more.\n" + MODEL)
        assert step.program.from_cache
        assert not compiles or cache == "JAX's"
        assert (lines_of(first), lines_of(step)) == ({5}, {6})
        # Another script that compiles the same step finds lines that still hold.
        del compiles[:]
        assert lines_of(compile_edited(MODEL)) == {5}
        assert not compiles or cache == "JAX's"


def lines_of(step):
    """Where the buffers of the peak come from, which the compiled program alone knows."""
    sources = [buffer.source for buffer in step.report().peak.largest if buffer.source]
    return {source.line for source in sources if source.file.endswith("model.py")}


@contextlib.contextmanager
def jax_cache(folder):
    """JAX's persistent cache in a folder; nothing for None."""
    settings = {
        "jax_compilation_cache_dir": folder and str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items() if folder else ():
        jax.config.update(name, value)
    reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
