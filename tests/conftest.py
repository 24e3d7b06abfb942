"""Eight simulated devices for every test process, asked for before JAX starts a backend."""

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

from shardkit._libtpu import quiet_libtpu  # noqa: E402

os.environ.update(quiet_libtpu(os.environ))

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# A busy machine may take any time for an example; no test here is about time.
hypothesis.settings.register_profile("shardkit", deadline=None)
hypothesis.settings.load_profile("shardkit")
