"""Device meshes, declared as data and built from real, simulated or absent devices."""

from ._build import target_devices as target_devices
from ._simulate import offer_devices as offer_devices
from ._simulate import settle_devices as settle_devices
from ._simulate import simulate_devices as simulate_devices
from ._spec import MeshSpec as MeshSpec
from ._spec import mesh_shapes as mesh_shapes
from ._target import Target as Target
