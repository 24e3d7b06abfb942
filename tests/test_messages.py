"""What the compiler says of a step, also where JAX's persistent cache keeps it from compiling."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.testing import simulated_devices


def rematerializing():
    """A step in which XLA knows no way but to gather an activation whole."""
    mesh = sk.MeshSpec(data=2, tensor=4).build()
    rules = sk.AxisRules({"rows": "data", "split": "tensor", "both": ("data", "tensor")})

    def loss(params, batch, key):
        x = sk.nn.constrain(jnp.sin(batch["x"][:, None] * params["w"]), "rows", None, "split")
        return jnp.mean(jnp.cos(sk.nn.constrain(x, None, "both", None)) ** 2)

    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((16, 8))},
        batch={"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
        mesh=mesh,
        strategy=sk.Strategy(batch=P("data"), activations=rules),
    )


def compiled_with_a_cache(folder):
    """Runs in a process of its own, whose cache belongs to nobody else."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reset_cache()
    first, second = rematerializing(), rematerializing()
    # CPU devices could deadlock in an executable from a file.
    assert (first.program.from_cache, second.program.from_cache) == (False, False)
    for report in (first.report(), second.report()):
        assert report.messages_complete
        found = [finding for finding in report.findings if finding.kind == "involuntary_remat"]
        assert found, str(report)
    # The cache is on for everybody else.
    assert not any("run" in file.name for file in Path(folder).iterdir())
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert any("lambda" in file.name for file in Path(folder).iterdir())


def test_several_cpu_devices_take_nothing_from_the_persistent_cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    simulated_devices(8, compiled_with_a_cache, str(folder))
