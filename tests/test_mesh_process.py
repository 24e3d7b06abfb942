"""What only a fresh process shows: imports that start nothing, devices asked for in time."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from shardkit._core.errors import MeshError
from shardkit.mesh import simulate_devices

FLAG = "--xla_force_host_platform_device_count"


def run(code, **env):
    """Runs code in a fresh interpreter; gives its output, errors last."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


# JAX refuses a number of CPU devices once it has started: the only public way to tell.
FRESH = "import jax; jax.config.update('jax_num_cpu_devices', 3); print('fresh')"
SHOW = "import jax; print(len(jax.devices()), jax.devices()[0].platform)"


def test_importing_starts_no_backend():
    code = f"import shardkit.mesh, shardkit.rules; shardkit.mesh.MeshSpec(data=2)\n{FRESH}"
    assert run(code) == "fresh\n"


def test_the_purity_check_can_fail():
    assert "should be updated before backends are initialized" in run(
        f"import jax; jax.devices()\n{FRESH}"
    )


SIMULATE = "from shardkit.mesh import simulate_devices; simulate_devices"


def test_simulated_before_start_and_again_after_it():
    assert run(f"{SIMULATE}(6)\n{SHOW}\nsimulate_devices(6)\n{SHOW}") == "6 cpu\n6 cpu\n"


def test_simulated_too_late():
    text = run(f"import jax; jax.devices()\n{SIMULATE}(6)")
    assert "simulate_devices(6)  JAX has started with 1 CPU device" in text
    assert "right after the imports" in text
    assert f"XLA_FLAGS={FLAG}=6" in text


def test_the_environment_may_have_asked_for_the_same():
    code = f"import jax; jax.devices()\n{SIMULATE}(4)\n{SHOW}"
    assert run(code, XLA_FLAGS=f"{FLAG}=4") == "4 cpu\n"


def test_the_environment_contradicts():
    text = run(f"{SIMULATE}(6)", XLA_FLAGS=f"{FLAG}=4")
    assert "XLA_FLAGS in the environment asks for 4 devices" in text
    assert f"remove {FLAG}=4 from XLA_FLAGS" in text


def test_selects_the_cpu_unless_the_environment_says_otherwise():
    show = "import jax; print(jax.config.jax_platforms)"
    assert run(f"{SIMULATE}(2)\n{show}") == "cpu\n"
    assert run(f"{SIMULATE}(2)\n{show}", JAX_PLATFORMS="cuda,cpu") == "cuda,cpu\n"


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "8"])
def test_the_number_is_a_positive_int(n):
    with pytest.raises(MeshError, match="is not a positive int"):
        simulate_devices(n)


def test_this_process_has_eight():
    assert len(jax.devices()) == 8
    simulate_devices(8)
    with pytest.raises(MeshError, match="JAX has started with 8 CPU devices"):
        simulate_devices(4)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [tpu] extra")
@pytest.mark.parametrize(
    ("target", "sizes", "dcn"),
    [
        pytest.param("tpu:v5p:4x4x4", {"data": 16, "tensor": 4}, {}, marks=pytest.mark.slow),
        pytest.param("tpu:v4:4x4x4", {"data": 16, "tensor": 4}, {}, marks=pytest.mark.slow),
        # 16 x 4 on an 8 x 8 torus splits a physical axis.
        pytest.param("tpu:v6e:8x8", {"data": 16, "tensor": 4}, {}, marks=pytest.mark.slow),
        ("tpu:tpu7x:2x2x4", {"data": 8, "tensor": 4}, {}),
        ("tpu:v5e:4x4:2", {"data": 4, "tensor": 4}, {"data": 2}),
    ],
)
def test_tpus_that_only_the_compiler_knows(target, sizes, dcn):
    code = f"""
from shardkit.mesh import MeshSpec, Target
mesh = MeshSpec(**{sizes}, dcn={dcn}).build({target!r})
assert mesh.size == Target.parse({target!r}).n_devices
slices = [{{getattr(d, "slice_index", 0) for d in row}} for row in mesh.devices]
print(mesh.devices.shape, {dcn} == {{}} or slices == [{{0}}] * 4 + [{{1}}] * 4)
"""
    text = run(code, JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    shape = tuple(size * dcn.get(axis, 1) for axis, size in sizes.items())
    assert f"{shape} True\n" in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [tpu] extra")
def test_a_shape_that_the_tpu_compiler_refuses():
    code = "from shardkit.mesh import MeshSpec; MeshSpec(data=-1).build('tpu:v5e:3x5')"
    text = run(code, JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    assert "tpu:v5e:3x5  the TPU compiler says: INVALID_ARGUMENT" in text
    assert "Fix: tpu:v5e:4x4" in text
