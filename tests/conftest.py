"""Eight simulated devices for every test process, asked for before JAX starts a backend.

Also tells, after the tests, which of them are long and not marked slow.
"""

import importlib.metadata
import os

# Programs run for milliseconds here, so that what tests cost is compilation. LLVM need not optimize
# them, and fusions come from the older emitter, which takes half the time of the one through MLIR.
# What XLA itself makes of a program, its collectives and buffers, stays the same. Later releases
# have only one emitter, and end a process whose flag they do not know.
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

# A busy machine may take any time for an example; no test here is about time.
hypothesis.settings.register_profile("shardkit", deadline=None)
hypothesis.settings.load_profile("shardkit")

# Seconds of processor time, of threads and ended children too, beyond which a test should be slow.
LONG = 15
_BEFORE = pytest.StashKey[float]()
_long: dict[str, float] = {}


def _spent():
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_BEFORE] = _spent()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        if "slow" not in item.keywords:
            item.user_properties.append(("cpu", _spent() - item.stash[_BEFORE]))


def pytest_runtest_logreport(report):
    seconds = dict(report.user_properties).get("cpu", 0)
    if report.when == "teardown" and seconds > LONG:
        _long[report.nodeid] = seconds


def pytest_terminal_summary(terminalreporter):
    if _long:
        terminalreporter.section(f"not marked slow, and more than {LONG} s of processor time")
    for name, seconds in sorted(_long.items(), key=lambda one: -one[1]):
        terminalreporter.line(f"{seconds:6.1f} s  {name}")
