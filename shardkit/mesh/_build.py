"""Devices in the order of a mesh: real, simulated, or known to a compiler only."""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from .._core.errors import MeshError, Problem, count, first_line, format_problems, raise_all
from ..hardware import find_chip
from ._target import Target, format_example


def target_devices(target: Target) -> list[Any]:
    """Lists the devices of a target, in JAX's order.

    They are the machine's own devices, its first n CPU devices, or TPU devices that only the
    compiler knows. Raises MeshError if this process has fewer CPU devices, the `[tpu]` extra is not
    installed, the TPU compiler does not know the shape, or the target is a GPU that is not in this
    process.
    """
    if target.kind == "local":
        return jax.devices()
    if target.kind == "cpu":
        return _cpu_devices(target)
    if target.kind == "tpu":
        return _tpu_devices(target)
    why = "absent GPUs are compiled for in a child process, not in this one"
    _refuse(
        target,
        why,
        f"shardkit report CONFIG --target {target}, or build() on a machine that has them",
    )


def check_devices(devices: Any) -> list[Any]:
    """Returns the devices that a user chose; raises MeshError if one is none, or is there twice."""
    fix = "build(devices=jax.devices()[:8])"
    if not isinstance(devices, Iterable) or isinstance(devices, str):
        problem = Problem(
            "devices", f"is of type {type(devices).__name__}, not a list of devices", fix
        )
        raise_all(MeshError, "These are no devices.", [problem])
    chosen: list[Any] = [*(devices.flat if isinstance(devices, np.ndarray) else devices)]
    problems = []
    for index, device in enumerate(chosen):
        if not isinstance(device, jax.Device):
            why = f"is of type {type(device).__name__}, not a device"
        elif device in chosen[:index]:
            why = f"is {device}, as devices[{chosen.index(device)}] is"
        else:
            continue
        problems.append(Problem(f"devices[{index}]", why, fix))
    raise_all(MeshError, "These are no devices.", problems)
    return chosen


def _cpu_devices(target: Target) -> list[Any]:
    devices, n = jax.devices("cpu"), target.shape[0]
    if len(devices) < n:
        why = f"the target has {n} CPU devices, this process has {len(devices)}"
        fix = f"sk.simulate_devices({n}) right after the imports, before JAX starts"
        _refuse(target, why, fix)
    return devices[:n]


def _tpu_devices(target: Target) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        why = "the TPU compiler (libtpu) is not installed"
        _refuse(target, why, 'install the extra: pip install "shardkit[tpu]"')
    options: dict[str, Any] = dict(find_chip(target.chip).topology_options)
    if target.slices > 1:
        options["num_slices"] = target.slices
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        _refuse(
            target,
            f"the TPU compiler says: {reason}",
            format_example(target.chip, len(target.shape)),
        )
    return list(topology.devices)


def arrange_devices(
    devices: Sequence[Any], ici: Mapping[str, int], dcn: Mapping[str, int], *, as_given: bool
) -> Mesh:
    """Lays devices out as a mesh with Auto axis types.

    An axis of size i within a slice (`ici`) and d across slices (`dcn`) has size d x i, with the
    slices outermost. `as_given` keeps the order of the devices, row-major, with contiguous blocks
    of it as slices; otherwise real devices are ordered by their network. Raises MeshError if `dcn`
    differs from the slices or processes that the devices form.
    """
    inner = tuple(ici.values())
    outer = tuple(dcn.get(axis, 1) for axis in ici)
    # Only TPU devices have a `slice_index`.
    slices = {getattr(device, "slice_index", 0) for device in devices}
    processes = {device.process_index for device in devices}
    if math.prod(outer) == 1 and not as_given and devices[0].platform != "cpu":
        if len(slices) > 1:
            _refuse_slices(ici, len(slices))
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    elif math.prod(outer) > 1 and not as_given and max(len(slices), len(processes)) > 1:
        by_process = len(slices) == 1
        _check_slices(dcn, len(processes) if by_process else len(slices), by_process=by_process)
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    else:
        grid = _stack_slices(devices, inner, outer)
    return Mesh(grid, tuple(ici), axis_types=(AxisType.Auto,) * len(inner))


def _stack_slices(
    devices: Sequence[Any], inner: tuple[int, ...], outer: tuple[int, ...]
) -> np.ndarray:
    """Cuts the devices into contiguous blocks, one per slice, and stacks these along each axis."""
    flat = np.empty(len(devices), dtype=object)
    flat[:] = devices
    grid = flat.reshape(outer + inner)
    n = len(inner)
    # 2 axes of sizes (2, 4) within 3 slices along the first: [3, 1, 2, 4] → [3, 2, 1, 4] → [6, 4].
    pairs = [dim for axis in range(n) for dim in (axis, n + axis)]
    sizes = [d * i for d, i in zip(outer, inner, strict=True)]
    return grid.transpose(pairs).reshape(sizes)


def _check_slices(dcn: Mapping[str, int], present: int, *, by_process: bool) -> None:
    declared = math.prod(dcn.values())
    if declared != present:
        groups = f"{present} processes" if by_process else f"{present} slices"
        why = f"needs {count(declared, 'slice')}, the devices form {groups}"
        fix = f"dcn sizes with product {present}, or no dcn for one fast network"
        raise MeshError.of("The mesh does not fit its slices.", f"dcn={dict(dcn)}", why, fix)


def _refuse_slices(ici: Mapping[str, int], present: int) -> NoReturn:
    """Suggests an axis that can cross slices, with its size inside each."""
    sizes = dict(ici)
    axis = next((axis for axis, size in sizes.items() if size % present == 0), next(iter(sizes)))
    sizes[axis] = max(1, sizes[axis] // present)
    written = ", ".join(f"{name}={size}" for name, size in sizes.items())
    problem = Problem(f"{present} slices", "dcn names no axis that crosses them")
    fix = f"MeshSpec({written}, dcn={{{axis!r}: {present}}})"
    raise MeshError(format_problems("The mesh does not fit its slices.", [problem], fix))


def _refuse(target: Target, why: str, fix: str) -> NoReturn:
    headline = "The target's devices are not available."
    raise MeshError.of(headline, str(target), why, fix)
