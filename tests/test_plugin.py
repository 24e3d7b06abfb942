"""The devices(n) marker, and functions in a child process with devices of its own."""

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from shardkit.errors import MeshError
from shardkit.testing import simulated_devices

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
_INSTALLED = importlib.metadata.entry_points(group="pytest11", name="shardkit")
_NAMED = [] if _INSTALLED else ["-p", "shardkit.testing._plugin"]

# Marked tests run on 9 devices in a child; 8 are there already.
_TESTS = """
    import jax, pytest

    @pytest.mark.devices(8)
    def test_here():
        assert len(jax.devices()) == 8

    @pytest.fixture
    def nine():
        return jax.devices()[8]

    @pytest.mark.devices(9)
    def test_child(nine):
        assert len(jax.devices()) == 9

    @pytest.mark.devices(9)
    def test_child_fails(nine):
        assert len(jax.devices()) == 10, "seen in the child"

    def test_unmarked():
        assert len(jax.devices()) == 8
"""
_INSISTS = """
    import os, jax
    if "SHARDKIT_TEST_IN_CHILD" in os.environ:
        jax.config.update("jax_num_cpu_devices", 2)
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """Runs a user's tests in this process; returns the code and what is shown."""
    (pytester.path / "test_it.py").write_text(textwrap.dedent(_TESTS))
    (pytester.path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*args):
        done = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", *_NAMED, *args)
        return done.ret, f"{done.stdout}{done.stderr}"

    return run


@pytest.mark.slow
def test_marked_tests_run_in_a_child_where_devices_are_few(project):
    code, text = project()
    assert code == 1
    assert "1 failed, 3 passed" in text
    assert "in a child process with 9 simulated devices:" in text
    assert "seen in the child" in text


def test_marked_tests_are_skipped_on_request_with_a_reason(project):
    code, text = project("--shardkit-devices=skip", "-rs")
    assert code == 0
    assert "2 passed, 2 skipped" in text
    assert "needs 9 devices, this process has 8 (--shardkit-devices=child runs it" in text


def test_a_conftest_that_sets_other_devices_is_an_error(project, pytester):
    (pytester.path / "conftest.py").write_text(textwrap.dedent(_INSISTS))
    code, text = project("-k", "test_child and not fails")
    assert code == 1
    assert "needs 9 devices, this process has 2, although started with 9" in text


def test_the_marker_takes_one_number(project, pytester):
    (pytester.path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.devices('two')\ndef test(): pass\n"
    )
    code, text = project()
    assert code != 0
    assert "write @pytest.mark.devices(8)" in text


def test_the_plugin_starts_no_backend(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import jax\ndef test():\n"
        "    jax.config.update('jax_num_cpu_devices', 5)\n"
        "    assert len(jax.devices('cpu')) == 5\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_NAMED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def devices_of(process, *, more):
    return len(jax.devices()) + more


def raising():
    raise KeyError("from the child")


def test_a_function_runs_in_a_child_with_its_own_devices():
    assert simulated_devices(3, devices_of, "child", more=0) == 3
    assert len(jax.devices()) == 8


def test_what_the_child_raises_comes_back():
    with pytest.raises(KeyError, match="from the child"):
        simulated_devices(1, raising)


def test_a_function_without_a_name_is_refused():
    with pytest.raises(MeshError) as raised:
        simulated_devices(2, lambda: None)
    message = str(raised.value)
    assert message.startswith("simulated_devices(2) cannot call this function.")
    assert "test_a_function_without_a_name_is_refused.<locals>.<lambda>" in message
    assert "Fix: define it at the top level of a module" in message
