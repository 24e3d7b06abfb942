"""Eight simulated devices for every test process, asked for before JAX starts a backend."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
