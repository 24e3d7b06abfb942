"""This machine's CPU as a chip, with measured rates of products, memory and calls."""

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
_ELEMENTS = 32 * 2**20
_REPEATS = 5


def measure_cpu(name: str = "cpu") -> Chip:
    """Measures products, memory and calls on the first CPU device, in about two seconds.

    Unlike the peaks of the table, the figures are rates that JAX programs reach here; simulated
    devices share them. A collective between simulated devices is a copy, so `link` is half of the
    bytes that memory reads and writes per second, and `latency` the call of an empty program.

    Args:
      name: of the chip.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        flops = {short: _measure_product(dtype) for short, dtype in _DTYPES.items()}
        array = jnp.ones(_ELEMENTS, jnp.float32)
        moved = 2 * array.nbytes / _median_seconds(jax.jit(lambda x: x + 1), array)
        hop = _median_seconds(jax.jit(lambda x: x), jnp.ones(()))
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
        sources={**dict.fromkeys(figures, here), "memory": "sysconf(SC_PHYS_PAGES)"},
    )


_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def _measure_product(dtype: Any) -> float:
    """FLOP/s of a product of two square matrices."""
    x = jnp.ones((_WIDTH, _WIDTH), dtype)
    return 2 * _WIDTH**3 / _median_seconds(jax.jit(lambda x: x @ x), x)


def _median_seconds(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Median seconds of a call, after one that compiles."""
    seconds = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
