"""Device meshes, declared as data and built from real, simulated or absent devices."""

from ._build import target_devices
from ._shapes import mesh_shapes
from ._simulate import offer_devices, settle_devices, simulate_devices
from ._spec import MeshSpec
from ._target import Target

__all__ = [
    "MeshSpec",
    "Target",
    "mesh_shapes",
    "offer_devices",
    "settle_devices",
    "simulate_devices",
    "target_devices",
]
