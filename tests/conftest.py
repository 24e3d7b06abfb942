"""Eight simulated devices for every test process, asked for before JAX starts a backend."""

import os

# Programs run for milliseconds here: LLVM need not optimize them, which halves what tests cost.
# What XLA itself makes of a program, its collectives and buffers, stays the same.
_QUICK = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), _QUICK]))

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
