"""shardkit leaves its caller's process unchanged, and imports modules when they are used."""

import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import shardkit as sk
from shardkit._core.startup import quiet_libtpu

ROOT = Path(__file__).parent.parent


def run_python(code: str, *words: str, **given) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process and captures its output."""
    given = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, **given}
    command = [sys.executable, "-c", textwrap.dedent(code), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, **given)


# --- imports


def find_loaded(code: str, *names: str) -> list[str]:
    """The modules of `names` that are loaded after running the code."""
    shown = f"\nimport sys\nprint(*[name for name in {names} if name in sys.modules])"
    done = run_python(textwrap.dedent(code) + shown)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


EVERYTHING = ("jax", "numpy", "flax", "optax", "rich", "orbax", "grain", "matplotlib", "asyncio")
LATER = (
    "flax",
    "orbax",
    "grain",
    "matplotlib",
    "tensorstore",
    "shardkit.run",
    "shardkit.lm",
)
COMPILE = """
import jax, optax, shardkit as sk
sk.simulate_devices(2)
sk.compile_step(
    lambda params, batch, key: ((params * batch) ** 2).mean(), optax.sgd(0.1),
    init=lambda key: jax.numpy.ones(4), batch=jax.ShapeDtypeStruct((4, 4), "float32"),
    mesh=sk.MeshSpec(data=2).build(), strategy=sk.strategies.data()).report()
"""


@pytest.mark.parametrize(
    ("code", "never"),
    [
        ("import shardkit", EVERYTHING),
        ("import shardkit as sk; sk.errors.MeshError, sk.nn, sk.ShardkitError", EVERYTHING),
        ("import shardkit.testing._plugin", EVERYTHING),
        ("import shardkit.cli._main as cli; cli.parser()", EVERYTHING),
        (COMPILE, LATER),
    ],
    ids=["import", "errors", "plugin", "cli", "compile"],
)
def test_nothing_is_imported_before_it_is_used(code, never):
    assert find_loaded(code, *never) == []


def test_an_early_import_is_detected():
    assert find_loaded("import shardkit as sk; sk.compile_step", *EVERYTHING) != []


@pytest.mark.parametrize("name", ["plan", "sweep", "verify", "explain_rules"])
def test_a_function_is_not_a_module_too(name):
    assert callable(getattr(sk, name))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"shardkit.{name}")


@pytest.mark.parametrize("options", [[], ["-p", "no:shardkit"]], ids=["plugin", "without"])
def test_a_test_session_without_markers_imports_nothing(tmp_path, options):
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test(request):\n"
        f"    assert not [name for name in {EVERYTHING[:-1]} if name in sys.modules]\n"
        "    print('plugin', request.config.pluginmanager.hasplugin('shardkit.testing._plugin') or"
        " request.config.pluginmanager.hasplugin('shardkit'))\n"
    )
    named = [] if options else ["-p", "shardkit.testing._plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *named, *options], cwd=tmp_path, env={**os.environ, **alone}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"plugin {not options}" in done.stdout


def test_a_public_name_is_the_function_whatever_was_imported_before():
    code = """
    import shardkit.planner, shardkit.sweeps, shardkit.parity, shardkit as sk
    assert all(map(callable, [sk.plan, sk.sweep, sk.verify]))
    """
    assert find_loaded(code) == []
    assert set(sk.__all__) <= set(dir(sk))
    for room in (sk, sk.nn, sk.testing, sk.errors):
        assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError, match="module 'shardkit' has no attribute 'compil_step'"):
        getattr(sk, "compil_step")  # noqa: B009


# --- the command line


LIGHT_COMMANDS = [["--help"], ["--version"], ["train", "--help"], ["trian"], ["plan", "nano"]]


@pytest.mark.parametrize("words", LIGHT_COMMANDS, ids=" ".join)
def test_help_the_version_and_usage_errors_import_nothing(words):
    code = """
    import sys
    from shardkit.cli import main
    try:
        main()
    except SystemExit as stop:
        print("\\nexit", stop.code)
    print(*[name for name in {0} if name in sys.modules])
    """
    done = run_python(code.format(EVERYTHING), *words)
    code, loaded = done.stdout.splitlines()[-2:]
    assert (code, loaded) == (f"exit {0 if words[-1].startswith('--') else 2}", "")


COMPLAINTS = re.compile("host bounds|InitGoogle|common_lib|Source Location Trace")


def libtpu_environment() -> dict[str, str]:
    """The environment of a machine with libtpu, no TPU, and no variables that say so."""
    ours = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS")
    others = {name: value for name, value in os.environ.items() if name not in ours}
    return {**others, "PYTHONPATH": str(ROOT), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.skipif(not quiet_libtpu({}), reason="a TPU may be here")
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        pytest.param(["hardware", "v5p", "--measure"], "measured", marks=pytest.mark.slow),
        pytest.param(
            ["verify", "--mesh", "data=1,tensor=1", "--steps=1", "--set=devices=local"],
            "equals one device",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["train", "--set=model=nano", "--set=mesh.tensor=1", "--set=data.batch_size=8"],
            "step",
            marks=pytest.mark.slow,
        ),
        (["launch", "-n1", "--", sys.executable, "-c", "import jax; jax.devices()"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_show_no_complaint_of_libtpu(words, shown, tmp_path):
    if words[0] == "train":
        words = [*words, "--set=data.seq_len=32", "--set=train.steps=2", "--set=devices=local"]
        words += ["--set=train.sample=0", "--set=train.baselines=false"]
    command = [sys.executable, "-m", "shardkit", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=libtpu_environment(), capture_output=True, text=True
    )
    assert not COMPLAINTS.search(done.stdout + done.stderr), done.stderr
    assert shown in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def test_libtpu_variables_are_not_set_if_they_exist_or_a_tpu_may_be_present(monkeypatch):
    assert quiet_libtpu({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    for device in ("/dev/accel0", "/dev/vfio/0"):
        there = lambda pattern, device=device: [device] * device.startswith(pattern[:9])  # noqa: E731
        monkeypatch.setattr("shardkit._core.startup.glob.glob", there)
        assert quiet_libtpu({}) == {}
    monkeypatch.setattr("shardkit._core.startup.glob.glob", lambda pattern: [])
    assert quiet_libtpu({}).keys() == {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"}


# --- descriptor 2

COPIED = """
import importlib.util, os, signal, subprocess, sys, threading, time
# Loaded from its file, so that no case imports JAX.
spec = importlib.util.spec_from_file_location("stderr", os.environ["STDERR"])
_stderr = sys.modules["stderr"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_stderr)
copied_stderr = _stderr.copied_stderr

def print_to_2(*lines):
    os.write(2, "".join(f"{line}\\n" for line in lines).encode())

before, descriptors = os.fstat(2), sorted(os.listdir("/proc/self/fd"))

def check():
    assert os.path.samestat(before, os.fstat(2))
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == 1
"""
ABORTS = """
with copied_stderr():
    print_to_2("Check failed: 1 == 2")
    os.abort()
"""
OVERLAP = """
together, texts = threading.Barrier(2), {}

def run(own):
    if own == "second":
        together.wait()  # begins after the first, ends after it
    with copied_stderr() as said:
        if own == "first":
            together.wait()
        head = f"W0512 12:34:56.789012  {threading.get_native_id()} a.cc:1] {own}"
        for number in range(100):
            print_to_2(f"{head} {number}", f"more of {own} {number}")
    texts[own] = said.text

threads = [threading.Thread(target=run, args=(own,)) for own in ("first", "second")]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
for own, other in (("first", "second"), ("second", "first")):
    for number in range(100):
        assert f"] {own} {number}\\nmore of {own} {number}\\n" in texts[own]
    assert other not in texts[own]
check()
"""
NESTED = """
with copied_stderr() as outer:
    print_to_2("a")
    with copied_stderr() as inner:
        print("b", file=sys.stderr)
    print_to_2("c")
assert (outer.text, inner.text) == ("a\\nb\\nc\\n", "b\\n"), (outer.text, inner.text)
check()
"""
RAISES = """
try:
    with copied_stderr() as said:
        print_to_2("a")
        raise KeyError
except KeyError:
    assert said.text == "a\\n"
check()
"""
INHERITED = """
_stderr._DRAIN_TIMEOUT = 0.2
with copied_stderr() as said:
    print_to_2("a")
    heir = subprocess.Popen(["sh", "-c", "sleep 1; echo later >&2"], stdout=subprocess.DEVNULL)
assert said.text == "a\\n"
check()
assert heir.wait() == 0
with copied_stderr() as said:
    print_to_2("b")
assert said.text == "b\\n"
check()
"""
INTERRUPTED = """
signal.signal(signal.SIGINT, lambda *_: None)
with copied_stderr() as said:
    os.killpg(0, signal.SIGINT)  # as a terminal does
    time.sleep(0.2)
    print_to_2("a")
assert said.text == "a\\n"
"""


@pytest.mark.parametrize("where", ["pipe", "pipe without tee", "file", "appended"])
@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (ABORTS, "Check failed: 1 == 2\n"),
        (OVERLAP, None),
        (NESTED, "a\nb\nc\n"),
        (RAISES, "a\n"),
        (INHERITED, "a\nlater\nb\n"),
        (INTERRUPTED, "a\n"),
    ],
    ids=["aborts", "overlap", "nested", "raises", "inherited", "interrupted"],
)
def test_stderr_is_read_and_still_shown(where, code, shown, tmp_path):
    given = {**os.environ, "STDERR": str(ROOT / "shardkit" / "step" / "_stderr.py")}
    if where == "pipe without tee":
        # Only `sh` and `sleep` are there, for the test's own process.
        for name in ("sh", "sleep"):
            (tmp_path / name).symlink_to(f"/bin/{name}")
        given["PATH"] = str(tmp_path)
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a" if where == "appended" else "w") as file:
        stderr = file if where in ("file", "appended") else subprocess.PIPE
        done = run_python(COPIED + code, start_new_session=True, env=given, stderr=stderr)
    text = log.read_text().removeprefix("before\n") if stderr is file else done.stderr
    assert done.returncode == (-signal.SIGABRT if code is ABORTS else 0), text
    if shown is None:
        assert sorted(re.findall(r"\] (\w+ \d+)", text)) == sorted(
            f"{own} {number}" for own in ("first", "second") for number in range(100)
        )
    elif code is INHERITED:  # what a child says later comes by a process of its own
        assert sorted(text.splitlines()) == sorted(shown.splitlines())
    else:
        assert text == shown


THREADS = """
import sys
sys.path.insert(0, {tests!r})
import importlib.util, os, threading, warnings
import shardkit as sk
sk.simulate_devices(8)
spec = importlib.util.spec_from_file_location("messages", {tests!r} + "/test_messages.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
before, filters, reports = os.fstat(2), list(warnings.filters), []
threads = [
    threading.Thread(target=lambda: reports.append(module.rematerializing().report()))
    for _ in range(3)
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
for report in reports:
    found = [one for one in report.findings if one.kind == "involuntary_remat"]
    assert len(found) == len([one for one in reports[0].findings if one.kind == found[0].kind])
assert len(reports) == 3
assert os.path.samestat(before, os.fstat(2))
assert warnings.filters == filters
"""


def test_steps_compiled_in_threads_at_once_find_their_own_messages():
    done = run_python(THREADS.format(tests=str(ROOT / "tests")))
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" in done.stderr


# --- the state of the process

GUEST = """
import gc, io, os, signal, sys, tempfile, threading, warnings
import jax, numpy, optax
jax.config.update("jax_num_cpu_devices", 8)
jax.jit(lambda x: x + 1)(jax.numpy.ones(8)).block_until_ready()

def read_process_state():
    gc.collect()
    descriptors = {}
    for number in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            descriptors[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            pass  # the one that lists the folder
    mask = os.umask(0o22)
    os.umask(mask)
    return {
        "config": dict(jax.config.values),
        "descriptors": descriptors,
        "handlers": {one: signal.getsignal(one) for one in signal.valid_signals()},
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "process": (os.getcwd(), mask, sys.excepthook, threading.excepthook, sys.path[:]),
    }

def loss(params, batch, key):
    return ((batch["x"] @ params["w"]) ** 2).mean()

def init(key):
    return {"w": jax.random.normal(key, (8, 4))}

def batch(number):
    return {"x": numpy.ones((8, 8), numpy.float32) * number}

def compile_on(mesh):
    return sk.compile_step(loss, optax.adam(1e-2), init=init, batch=batch(0), mesh=mesh,
                           strategy=sk.strategies.data())

def import_all():
    global sk
    import shardkit as sk
    for name in sk.__all__:
        getattr(sk, name)

def compile_step():
    global step
    step = compile_on(sk.MeshSpec(data=8).build())

def call_step():
    state, metrics = step(step.init(jax.random.key(0)), batch(1))
    step.evaluate(state, batch(2))
    jax.block_until_ready(state)

def plan():
    spec = sk.StepSpec(loss_fn=loss, optimizer=optax.adam(1e-2), init=init, batch=batch(0),
                       strategy=sk.strategies.data())
    space = sk.SearchSpace(("data",), remat=("none",), accumulate=(1,))
    sk.plan(spec, "tpu:v5p:2x2x1", space=space)

def train():
    from rich.console import Console
    with tempfile.TemporaryDirectory() as folder:
        config = sk.TrainConfig(steps=3, log_every=1, checkpoint_every=0)
        sk.Trainer(step, batch, folder, config=config, console=Console(file=io.StringIO())).run()

def interrupt():
    from rich.console import Console
    def stopping(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(number)
    with tempfile.TemporaryDirectory() as folder:
        config = sk.TrainConfig(steps=9, log_every=1, checkpoint_every=0)
        try:
            sk.Trainer(step, stopping, folder, config=config,
                       console=Console(file=io.StringIO())).run()
        except KeyboardInterrupt:
            return
    raise AssertionError("not stopped")

CALLS = {
    "import": import_all,
    "compile_step": compile_step,
    "call": call_step,
    "report": lambda: str(step.report()),
    "verify": lambda: sk.verify(compile_on, [sk.MeshSpec(data=4)], steps=2),
    "plan": plan,
    "Trainer": train,
    "Trainer, Ctrl-C": interrupt,
}
"""
COMPARED = """
for name, call in CALLS.items():
    before = read_process_state()
    call()
    after = read_process_state()
    for what in before:
        if after[what] != before[what]:
            print(f"{name} changes {what}: {before[what]} -> {after[what]}")
"""
# Code that changes each line of the state, so that every comparison is seen to fail.
CHANGES = {
    "config": "jax.config.update('jax_enable_x64', True)",
    "descriptors": "os.dup(2)",
    "handlers": "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    "threads": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "environment": "os.environ.update(A='1')",
    "filters": "warnings.simplefilter('ignore')",
    "process": "os.chdir('/')",
}


def test_every_call_leaves_the_process_as_it_was():
    done = run_python(GUEST + COMPARED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


SWALLOWED = """
import os, signal, sys, time
from shardkit._core.interrupts import InterruptGuard

class Finalized:
    def __init__(self, how): self.how = how
    def __del__(self): self.how()

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)  # what is raised here is swallowed, as in a callback of the garbage collector

def fail(): raise ValueError("as ever")

hook = sys.unraisablehook
try:
    with InterruptGuard() as guard:
        Finalized(fail)
        Finalized(ctrl_c)
        time.sleep(20)
        print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", guard.interrupted, sys.unraisablehook is hook)
"""


def test_ctrl_c_in_a_callback_that_swallows_it_still_interrupts():
    done = run_python(SWALLOWED)
    assert done.stdout == "interrupted True True\n"
    assert "ValueError: as ever" in done.stderr
    assert "KeyboardInterrupt" not in done.stderr


SWALLOWED_TERM = (
    SWALLOWED[: SWALLOWED.index("hook =")].replace("SIGINT", "SIGTERM")
    + """
from shardkit.run._stop import Stopped, StopRequest

try:
    with StopRequest() as stop, stop.raise_at_once(lambda: "saved"):
        Finalized(ctrl_c)
        time.sleep(20)
        print("not stopped")
except Stopped as stopped:
    print("stopped", stopped.__notes__)
"""
)


def test_sigterm_in_a_callback_that_swallows_it_still_stops():
    done = run_python(SWALLOWED_TERM)
    assert done.stdout == "stopped ['saved']\n"
    assert "Stopped" not in done.stderr


def test_every_change_of_the_process_is_detected():
    calls = ", ".join(f"{what!r}: lambda: {code}" for what, code in CHANGES.items())
    done = run_python(f"{GUEST}\nCALLS = {{{calls}}}\n{COMPARED}")
    assert done.returncode == 0, done.stderr
    seen = re.findall("^(.*) changes (.*?):", done.stdout, re.M)
    assert seen == [(what, what) for what in CHANGES]


def test_a_loss_that_imports_flax_gets_its_rules_or_an_error():
    code = """
    import jax, optax, shardkit as sk
    sk.simulate_devices(2)
    @jax.jit
    def model(x):
        import flax.linen as nn
        return nn.with_logical_constraint(x, ("batch", "embed"))
    def loss_fn(params, batch, key):
        return (model(params * batch) ** 2).mean()
    def compiled():
        return sk.compile_step(
            loss_fn, optax.sgd(0.1), init=lambda key: jax.numpy.ones(4),
            batch=jax.ShapeDtypeStruct((4, 4), "float32"), mesh=sk.MeshSpec(data=2).build(),
            strategy=sk.strategies.data())
    try:
        compiled()
    except sk.errors.ShardingError as error:
        assert "imports flax while it is traced" in str(error)
    assert "spec=P('data', None)" in str(compiled().program.jaxpr)
    print("both")
    """
    assert run_python(code).stdout.strip() == "both"
