"""The pytest plugin: `@pytest.mark.devices(8)`.

A test so marked runs as any other where the process has at least that many devices. Where it has
fewer, the test alone runs again in a child process with as many simulated CPU devices.
`--shardkit-devices=skip` skips it there instead.

The plugin itself imports nothing of JAX: a session that uses no marker starts no backend.
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
        help="what becomes of a test marked devices(n) where there are fewer: run it in a child "
        "process with n simulated devices (default), or skip it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Replaces what a marked item runs where the process has too few devices."""
    wanted = _wanted(item)
    if wanted is None:
        return
    present = _present()
    if present >= wanted:
        return
    # No fixture of the test is made here: they may need the devices too.
    item.setup = lambda: None
    item.runtest = _instead(item, wanted, present)


def _instead(item: pytest.Item, wanted: int, present: int) -> Callable[[], None]:
    short = f"needs {wanted} devices, this process has {present}"
    if os.environ.get(_IN_CHILD):
        fix = "a conftest that sets a number of devices of its own leaves it to the environment"
        return lambda: pytest.fail(f"{short}, though started to have {wanted}. Fix: {fix}.", False)
    if item.config.getoption("--shardkit-devices") == "skip":
        return lambda: pytest.skip(f"{short} (--shardkit-devices=child runs it in a child process)")
    return lambda: _run_in_child(item, wanted)


def _run_in_child(item: pytest.Item, n: int) -> None:
    args = [
        sys.executable,
        "-m",
        "pytest",
        item.nodeid,
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    if not item.config.pluginmanager.hasplugin("shardkit"):
        args += ["-p", __name__]  # loaded by name here, as from a checkout that is not installed
    if item.config.pluginmanager.hasplugin("xdist"):
        args += ["-n", "0"]
    root = str(item.config.rootpath)
    done = subprocess.run(
        [*args, f"--rootdir={root}"], cwd=root, env=_environment(n), capture_output=True, text=True
    )
    if done.returncode:
        text = f"in a child process with {n} simulated devices:\n{done.stdout}{done.stderr}"
        pytest.fail(text, pytrace=False)
    if re.search(r"\b\d+ skipped\b", done.stdout) and " passed" not in done.stdout:
        pytest.skip(f"skipped in a child process with {n} simulated devices")


def _environment(n: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    return {
        **os.environ,
        "XLA_FLAGS": kept,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(n),
        _IN_CHILD: "1",
    }


def _wanted(item: pytest.Item) -> int | None:
    marker: Any = item.get_closest_marker("devices")
    if marker is None:
        return None
    if len(marker.args) != 1 or marker.kwargs or not isinstance(marker.args[0], int):
        raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.devices(8)")
    return marker.args[0]


def _present() -> int:
    import jax  # here, so that a session without the marker does without it

    return len(jax.devices())
