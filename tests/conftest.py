"""Gives every test process eight simulated devices, before JAX starts a backend.

Also reports, after the tests, those that are long and not marked slow.
"""

import importlib.metadata
import os

# The programs of tests run for milliseconds, so their cost is compilation. LLVM need not optimize
# them, and the older emitter of fusions takes half the time of the one through MLIR. XLA's choices
# of collectives and buffers stay the same. Later releases have one emitter, and abort on flags that
# they do not know.
_QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), _QUICK]))

from shardkit._core.startup import quiet_libtpu  # noqa: E402

os.environ.update(quiet_libtpu(os.environ))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# No test here measures time, and a busy machine can take any time for an example.
hypothesis.settings.register_profile("shardkit", deadline=None)
hypothesis.settings.load_profile("shardkit")

# A test that takes more seconds of processor time, with threads and children, should be slow.
LONG = 15
_BEFORE = pytest.StashKey[float]()
_long: dict[str, float] = {}


@pytest.fixture(scope="session")
def float16():
    """Skips what needs float16 where XLA lacks its casts: `--xla_cpu_max_isa=SSE4_2`."""
    try:
        jax.jit(lambda x: x.astype("float16"))(jax.numpy.zeros(2))
    except jax.errors.JaxRuntimeError as error:
        pytest.skip(f"plain JAX cannot cast to float16 here: {error}")


def _processor_time():
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_BEFORE] = _processor_time()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        if "slow" not in item.keywords:
            item.user_properties.append(("cpu", _processor_time() - item.stash[_BEFORE]))


def pytest_runtest_logreport(report):
    seconds = dict(report.user_properties).get("cpu", 0)
    if report.when == "teardown" and seconds > LONG:
        _long[report.nodeid] = seconds


def pytest_terminal_summary(terminalreporter):
    if _long:
        terminalreporter.section(f"not marked slow, and more than {LONG} s of processor time")
    for name, seconds in sorted(_long.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{seconds:6.1f} s  {name}")
