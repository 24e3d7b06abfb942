"""Mesh, device and versions behind the numbers of a run."""

import importlib.metadata
import platform
import time
from typing import Any

from jax.sharding import Mesh

from ._console import is_simulated


def environment(mesh: Mesh) -> dict[str, Any]:
    """Returns mesh, device, versions and UTC time, for the first row of the metrics."""
    device = mesh.devices.flat[0]
    return {
        "mesh": dict(mesh.shape),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": mesh.size,
            "simulated": is_simulated(mesh),
        },
        "versions": package_versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine the numbers of a run."""
    names = ("shardkit", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if _is_installed(name)}
    return {"python": platform.python_version(), **versions}


def _is_installed(name: str) -> bool:
    """Whether a distribution is installed; shardkit is not when it runs from a checkout."""
    return any(True for _ in importlib.metadata.distributions(name=name))
