"""Builds meshes on the devices of a target, also on absent GPUs that only the compiler knows."""

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from .._core.errors import MeshError, first_line
from ..hardware import gpu_target_config
from ..mesh import MeshSpec, Target


def build_target_mesh(mesh: MeshSpec, target: Target) -> Mesh:
    """Builds a mesh on the devices of a target: present, simulated, or absent.

    GPUs are ordered by slice, then host, so that the last axes of a mesh stay within a host. Raises
    MeshError if the mesh does not fit, or the target's compiler is not installed or does not know
    the topology.
    """
    if target.kind != "gpu":
        return mesh.build(str(target))
    return mesh.build(devices=_gpu_devices(target))


def _gpu_devices(target: Target) -> list[Any]:
    # find_spec raises for a module of a package that is not installed, so the package is first.
    packages = ("jax_plugins", "jax_plugins.xla_cuda13")
    if not all(importlib.util.find_spec(package) for package in packages):
        why = "the CUDA compiler is not installed"
        fix = 'install the extra (several GB): pip install "shardkit[cuda13]"'
        _refuse(target, why, fix)
    hosts, gpus = target.shape
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.chip,
            topology=f"{target.slices}x{hosts}x{gpus}",
            target_config=gpu_target_config(target.chip),
        )
    except jax.errors.JaxRuntimeError as error:
        _refuse(target, f"the CUDA compiler says: {first_line(error)}", "gpu:h100:1x8")
    return list(topology.devices)


def _refuse(target: Target, why: str, fix: str) -> None:
    headline = "The target's devices are not available."
    raise MeshError.of(headline, str(target), why, fix)
