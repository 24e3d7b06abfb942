"""Simulated devices: one CPU made to look like several."""

import os
import re
from typing import NoReturn

import jax

from .._core.errors import MeshError, count
from .._core.tracing import SETTINGS

# Whether the number of devices of this process is final.
_settled = False

_FLAG = "--xla_force_host_platform_device_count"


def simulate_devices(n: int) -> None:
    """Makes JAX show `n` CPU devices that share this machine's processor.

    Call it right after the imports: JAX fixes its devices with the first array, key or
    `jax.devices()`. A later call does nothing if JAX has exactly these devices. Unless
    `JAX_PLATFORMS` is set it also selects the CPU, so that `jax.devices()` lists the simulated
    devices on a machine with an accelerator too. They show what a program computes and sends on
    a mesh, not how fast.

    Args:
      n: number of devices of this process.

    Raises:
      MeshError: `n` is not a positive int, JAX has started with other devices, or
        `XLA_FLAGS` asks for another number.
    """
    new = offer_devices(n)
    if new and not SETTINGS.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def settle_devices(n: int | None) -> None:
    """Fixes the devices of this process; later calls of `simulate_devices` do nothing.

    A child process that compiles for another target runs the user's program, which may call it.
    None is for a target that needs no simulated devices.
    """
    global _settled
    if n is not None:
        simulate_devices(n)
    _settled = True


def offer_devices(n: int) -> bool:
    """Makes JAX show `n` CPU devices without selecting the CPU: an accelerator stays the default.

    Returns False if the number of devices was fixed before. Raises MeshError as `simulate_devices`.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        _refuse(n, f"{n!r} is not a positive int", "sk.simulate_devices(8)")
    if _settled:
        return False
    flagged = re.findall(rf"{_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if flagged and int(flagged[-1]) != n:
        why = f"XLA_FLAGS in the environment asks for {count(int(flagged[-1]), 'device')}"
        _refuse(
            n,
            why,
            f"remove {_FLAG}={flagged[-1]} from XLA_FLAGS, or sk.simulate_devices({flagged[-1]})",
        )
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:
        _check_started(n)
        return False
    return True


def _check_started(n: int) -> None:
    present = len(jax.devices("cpu"))
    if present != n:
        _refuse(
            n,
            f"JAX has started with {count(present, 'CPU device')}",
            f"call sk.simulate_devices({n}) right after the imports, before the first array, key "
            f"or jax.devices(); or set XLA_FLAGS={_FLAG}={n} in the environment; or use a child "
            f"process: shardkit.testing.simulated_devices({n})",
        )


def _refuse(n: object, why: str, fix: str) -> NoReturn:
    raise MeshError.of("Devices cannot be simulated.", f"simulate_devices({n!r})", why, fix)
