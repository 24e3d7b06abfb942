"""This machine's CPU as a chip: what products, memory and copies take, measured on request."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._chips import Chip

_WIDTH = 1024
_MANY = 32 * 2**20
_TURNS = 5


def measure_cpu(name: str = "cpu") -> Chip:
    """Measures products, memory and calls on the first CPU device, about two seconds.

    The figures are what programs of JAX reach here, unlike the peaks of the table; simulated
    devices share them. A collective between such devices is a copy, so a link is half of what
    memory reads and writes, and a hop is the call of an empty program.

    Args:
      name: of the chip.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        flops = {short: _products(dtype) for short, dtype in _DTYPES.items()}
        many = jnp.ones(_MANY, jnp.float32)
        moved = 2 * many.nbytes / _median(jax.jit(lambda x: x + 1), many)
        hop = _median(jax.jit(lambda x: x), jnp.ones(()))
    when = time.strftime("%Y-%m-%d", time.gmtime())
    here = (
        f"measured on {when}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    figures = ("flops", "memory_bandwidth", "link", "network", "latency")
    return Chip(
        name=name,
        kind="cpu",
        runtime_names=(),
        flops=flops,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_bandwidth=moved,
        clock=None,
        link=moved / 2,
        torus_dims=0,
        domain=None,
        network=moved / 2,
        latency=hop,
        sources={**dict.fromkeys(figures, here), "memory": "what the system says it has"},
    )


_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def _products(dtype: Any) -> float:
    """FLOP/s of a square product."""
    x = jnp.ones((_WIDTH, _WIDTH), dtype)
    return 2 * _WIDTH**3 / _median(jax.jit(lambda x: x @ x), x)


def _median(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of a call behind one that compiles."""
    taken = []
    for _ in range(1 + _TURNS):
        start = time.perf_counter()
        call(x).block_until_ready()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
