"""The pytest plugin: `@pytest.mark.devices(8)`.

A marked test runs normally in a process with at least that many devices. With fewer, this one test
runs again in a child process with that many simulated CPU devices; `--shardkit-devices=skip` skips
it instead.

The plugin does not import JAX: a session without the marker starts no backend.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

_MARKER = "devices(n): needs n devices; with fewer it runs in a child process that simulates them"
_IN_CHILD = "SHARDKIT_TEST_IN_CHILD"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--shardkit-devices`."""
    parser.getgroup("shardkit").addoption(
        "--shardkit-devices",
        choices=("child", "skip"),
        default="child",
        help="with fewer than n devices, run a test marked devices(n) in a child process with n "
        "simulated devices (default), or skip it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Replaces the body of a marked test if the process has too few devices."""
    required = _required_devices(item)
    if required is None:
        return
    present = _count_devices()
    if present >= required:
        return
    # The child sets up the fixtures, which can need the devices too.
    item.setup = lambda: None
    item.runtest = _replace_test(item, required, present)


def _replace_test(item: pytest.Item, required: int, present: int) -> Callable[[], None]:
    short = f"needs {required} devices, this process has {present}"
    if os.environ.get(_IN_CHILD):
        fix = "do not set the number of devices in a conftest"
        return lambda: pytest.fail(f"{short}, although started with {required}. Fix: {fix}.", False)
    if item.config.getoption("--shardkit-devices") == "skip":
        return lambda: pytest.skip(f"{short} (--shardkit-devices=child runs it in a child process)")
    return lambda: _run_in_child(item, required)


def _run_in_child(item: pytest.Item, n: int) -> None:
    args = [sys.executable, "-m", "pytest", item.nodeid, "-q", "--no-header"]
    args += ["-p", "no:cacheprovider"]
    if not item.config.pluginmanager.hasplugin("shardkit"):
        args += ["-p", __name__]  # a checkout that is not installed
    if item.config.pluginmanager.hasplugin("xdist"):
        args += ["-n", "0"]
    root = item.config.rootpath
    args.append(f"--rootdir={root}")
    environment = _child_environment(n)
    done = subprocess.run(args, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        text = f"in a child process with {n} simulated devices:\n{done.stdout}{done.stderr}"
        pytest.fail(text, pytrace=False)
    if re.search(r"\b\d+ skipped\b", done.stdout) and " passed" not in done.stdout:
        pytest.skip(f"skipped in a child process with {n} simulated devices")


def _child_environment(n: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        **os.environ,
        "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(n),
        _IN_CHILD: "1",
    }


def _required_devices(item: pytest.Item) -> int | None:
    marker: Any = item.get_closest_marker("devices")
    if marker is None:
        return None
    if len(marker.args) != 1 or marker.kwargs or not isinstance(marker.args[0], int):
        raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.devices(8)")
    return marker.args[0]


def _count_devices() -> int:
    import jax  # only for marked tests

    return len(jax.devices())
