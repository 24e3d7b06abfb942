"""The devices(n) marker, and functions in a child process with devices of its own."""

import importlib.metadata
import subprocess
import sys
import textwrap

import jax
import pytest

from shardkit._errors import MeshError
from shardkit.testing import simulated_devices

# Marked tests run on 3 devices in a child; 2 are there already; conftest is as a user's may be.
_CONFTEST = """
    import jax
    jax.config.update("jax_platforms", "cpu")
    if "JAX_NUM_CPU_DEVICES" not in __import__("os").environ:
        jax.config.update("jax_num_cpu_devices", 2)
"""
_TESTS = """
    import jax, pytest

    @pytest.mark.devices(2)
    def test_here():
        assert len(jax.devices()) == 2

    @pytest.fixture
    def three():
        return jax.devices()[2]

    @pytest.mark.devices(3)
    def test_child(three):
        assert len(jax.devices()) == 3

    @pytest.mark.devices(3)
    def test_child_fails(three):
        assert len(jax.devices()) == 4, "seen in the child"

    def test_unmarked():
        assert len(jax.devices()) == 2
"""


def _pytest(folder, *args):
    installed = importlib.metadata.entry_points(group="pytest11", name="shardkit")
    named = [] if installed else ["-p", "shardkit.testing._plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named]
    done = subprocess.run([*command, *args], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    (tmp_path / "conftest.py").write_text(textwrap.dedent(_CONFTEST))
    (tmp_path / "test_it.py").write_text(textwrap.dedent(_TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    return tmp_path


def test_marked_tests_run_in_a_child_where_devices_are_few(project):
    code, text = _pytest(project)
    assert code == 1
    assert "1 failed, 3 passed" in text
    assert "in a child process with 3 simulated devices:" in text
    assert "seen in the child" in text


def test_marked_tests_are_skipped_on_request_with_a_reason(project):
    code, text = _pytest(project, "--shardkit-devices=skip", "-rs")
    assert code == 0
    assert "2 passed, 2 skipped" in text
    assert "needs 3 devices, this process has 2 (--shardkit-devices=child runs it" in text


def test_a_conftest_that_insists_on_other_devices_is_told(project):
    (project / "conftest.py").write_text(
        'import jax\njax.config.update("jax_num_cpu_devices", 2)\n'
    )
    code, text = _pytest(project, "-k", "test_child and not fails")
    assert code == 1
    assert "needs 3 devices, this process has 2, though started to have 3" in text


def test_the_marker_takes_one_number(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.devices('two')\ndef test(): pass\n"
    )
    code, text = _pytest(tmp_path)
    assert code != 0
    assert "write @pytest.mark.devices(8)" in text


def test_the_plugin_starts_no_backend(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import jax\ndef test():\n"
        "    jax.config.update('jax_num_cpu_devices', 5)\n"
        "    assert len(jax.devices('cpu')) == 5\n"
    )
    code, text = _pytest(tmp_path)
    assert code == 0, text


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
    assert message.startswith("simulated_devices(2) cannot call this.")
    assert "test_a_function_without_a_name_is_refused.<locals>.<lambda>" in message
    assert "Fix: define it at the top level of a module" in message
