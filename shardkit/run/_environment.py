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
    names = ("shardkit", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "mesh": dict(mesh.shape),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": mesh.size,
            "simulated": is_simulated(mesh),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names if _installed(name)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _installed(name: str) -> bool:
    """Whether a distribution is known; shardkit itself is not where it runs from a checkout."""
    return any(True for _ in importlib.metadata.distributions(name=name))
