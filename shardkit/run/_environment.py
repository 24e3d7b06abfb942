"""Where the numbers of a run come from."""

import importlib.metadata
import platform
import time
from typing import Any

from jax.sharding import Mesh

from ._console import is_simulated


def environment(mesh: Mesh) -> dict[str, Any]:
    """What a reader of the numbers has to know of where they come from."""
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
    """Versions of what decides the numbers of a run."""
    names = ("shardkit", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), **found}


def _installed(name: str) -> bool:
    """Whether a distribution is known; shardkit itself is not where it runs from a checkout."""
    return any(True for _ in importlib.metadata.distributions(name=name))
