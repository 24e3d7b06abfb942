"""Executables in a file, by what they were compiled from: a step that starts without compiling.

    step.saved                     a zip file, every member with its checksum
      header.json                  schema, mesh, devices, environment
      6f0c….program                an executable, by `jax.experimental.serialize_executable`
      6f0c….log                    what the compiler printed

The name of an executable is the SHA-256 of the lowered program, the compiler's options and the
environment. A step that is loaded is traced and lowered as always, and takes the executable of its
name or compiles: one of another model, version, flag or machine has another name and never runs.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import platform
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, SavedStepWarning, StepError, first_line, format_problems
from .._core.io._files import os_errors_as, write_atomic

_SCHEMA, _VERSION, _HEADER = "shardkit.step", 1, "header.json"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_ALLOCATOR")
_UNREADABLE = (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError)


def describe_environment(mesh: Mesh) -> dict[str, str]:
    """What decides, besides a program, which executable its compiler makes, as text by name."""
    device = mesh.devices.flat[0]
    environment = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "compiler": device.client.platform_version,
        "devices": str([d.id for d in mesh.devices.flat]),
    }
    if device.platform == "cpu":
        environment["cpu"] = _describe_cpu()
    return environment | {name: os.environ.get(name, "") for name in _FLAGS}


def _describe_cpu() -> str:
    """The instructions of this CPU: code for one CPU can crash another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name_program(lowered: jax.stages.Lowered, options: Mapping[str, Any], mesh: Mesh) -> str:
    """Returns the name of a lowered program's executable, 64 hexadecimal digits.

    Args:
      lowered: the program.
      options: of the compiler.
      mesh: its devices.
    """
    compiled_from = [lowered.as_text(), sorted((k, repr(v)) for k, v in options.items())]
    compiled_from.append(sorted(describe_environment(mesh).items()))
    return hashlib.sha256(json.dumps(compiled_from).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class SavedPrograms:
    """The executables of one file.

    Attributes:
      path: the file.
      mesh: devices and axes that they were compiled for.
      environment: what they were compiled in; see `describe_environment`.
      names: of the executables.
    """

    path: pathlib.Path
    mesh: Mesh
    environment: Mapping[str, str]
    names: frozenset[str]

    def load(
        self, name: str, lowered: jax.stages.Lowered
    ) -> tuple[jax.stages.Compiled, str] | None:
        """Returns an executable and what its compiler printed; None if the file lacks it.

        A damaged one is reported (`SavedStepWarning`), and None is returned.
        """
        if name not in self.names:
            return None
        try:
            with zipfile.ZipFile(self.path) as file:
                program, log = file.read(f"{name}.program"), file.read(f"{name}.log")
            devices = list(self.mesh.devices.flat)
            trees = lowered.in_tree, lowered.out_tree
            compiled = serialize_executable.deserialize_and_load(
                program, *trees, execution_devices=devices
            )
        except (*_UNREADABLE, OSError, pickle.UnpicklingError, jax.errors.JaxRuntimeError) as error:
            warn_stale(self.path, [Problem(f"program {name[:12]}", f"is damaged: {error}")])
            return None
        return compiled, log.decode("utf-8", "replace")


def save_programs(
    path: str | os.PathLike[str],
    programs: Mapping[str, tuple[jax.stages.Compiled, str]],
    mesh: Mesh,
) -> None:
    """Writes executables into one file, which appears whole or not at all.

    Args:
      path: the file; its folder must exist.
      programs: name → (executable, what its compiler printed).
      mesh: their devices.

    Raises:
      StepError: the file cannot be written; the step calls Python, which no file holds; or several
        processes run the step, each of which would
        need a file of its own.
    """
    if jax.process_count() > 1:
        why = f"{jax.process_count()} processes run this step, each an executable of its own"
        fix = "jax.config.update('jax_compilation_cache_dir', ...) keeps those of all processes"
        problem = Problem(os.fspath(path), why)
        raise StepError(format_problems("The step cannot be saved.", [problem], fix))
    header = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "mesh": list(mesh.shape.items()),
        "devices": [device.id for device in mesh.devices.flat],
        "environment": describe_environment(mesh),
        "programs": sorted(programs),
    }
    written = {name: _serialize(compiled) for name, (compiled, _) in programs.items()}
    fix = "step.save of a path in a folder that exists and can be written"
    with (
        os_errors_as(StepError, "The step cannot be saved.", os.fspath(path), fix),
        write_atomic(pathlib.Path(path), sync=True) as partial,
        zipfile.ZipFile(partial, "w") as file,
    ):
        file.writestr(_HEADER, json.dumps(header, indent=1))
        for name, (_, log) in programs.items():
            file.writestr(f"{name}.program", written[name])
            file.writestr(f"{name}.log", log)


def _serialize(compiled: jax.stages.Compiled) -> bytes:
    try:
        return serialize_executable.serialize(compiled)[0]
    except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
        why = f"cannot be written: {first_line(error)}"
        fix = "a loss without jax.debug.print and callbacks, which call Python of this process"
        problem = Problem("the program", why)
        raise StepError(format_problems("The step cannot be saved.", [problem], fix)) from error


def open_programs(path: str | os.PathLike[str], mesh: Mesh | None) -> SavedPrograms:
    """Opens a file of executables.

    Args:
      path: the file.
      mesh: the mesh to run on; None for the axes and devices of the file.

    Raises:
      StepError: there is no such file, or it cannot be read and no mesh is given, or its devices
        are not here.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            header = json.loads(file.read(_HEADER))
        if (header["schema"], header["version"]) != (_SCHEMA, _VERSION):
            raise ValueError(f"has schema {header['schema']!r}, version {header['version']!r}")
        environment = {str(k): str(v) for k, v in header["environment"].items()}
        names = frozenset(map(str, header["programs"]))
        saved_mesh = mesh if mesh is not None else _build_mesh(path, header)
    except (*_UNREADABLE, TypeError, AttributeError, OSError) as error:
        if isinstance(error, StepError):
            raise
        missing = isinstance(error, FileNotFoundError)
        why = "does not exist" if missing else f"is not a saved step: {error}"
        problem = Problem(str(path), why)
        if mesh is None or missing:
            fix = f"step.save({str(path)!r}); or pass mesh=, which compiles the step anew"
            raise StepError(
                format_problems("The saved step cannot be loaded.", [problem], fix)
            ) from None
        warn_stale(path, [problem])
        return SavedPrograms(path, mesh, {}, frozenset())
    return SavedPrograms(path, saved_mesh, environment, names)


def _build_mesh(path: pathlib.Path, header: Mapping[str, Any]) -> Mesh:
    """The mesh of a file, of this process's devices with the same numbers."""
    platform_name = header["environment"]["platform"]
    try:
        here = {device.id: device for device in jax.devices(platform_name)}
    except RuntimeError:
        here = {}
    numbers, axes = header["devices"], dict(header["mesh"])
    if lacking := [n for n in numbers if n not in here]:
        why = f"needs {platform_name} devices {lacking}; this process has {sorted(here)}"
        fix = f"sk.simulate_devices({len(numbers)}) before JAX starts; or pass mesh="
        problem = Problem(str(path), why)
        raise StepError(format_problems("The saved step cannot be loaded.", [problem], fix))
    devices = np.array([here[n] for n in numbers]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def list_differences(saved: SavedPrograms) -> Iterator[Problem]:
    """What differs between the environment of a file and this process."""
    now = describe_environment(saved.mesh)
    for name in dict.fromkeys([*saved.environment, *now]):
        before, after = saved.environment.get(name, ""), now.get(name, "")
        if before != after:
            yield Problem(name, f"was {before or 'not set'!r}, is {after or 'not set'!r}")


def warn_stale(path: pathlib.Path, problems: Sequence[Problem], *, stacklevel: int = 4) -> None:
    """Warns that executables of a file are not used.

    Args:
      path: the file.
      problems: why.
      stacklevel: of the user's call, counted from here: 4 below `open_programs`.
    """
    fix = f"step.save({str(path)!r}) once it has compiled"
    headline = f"The step compiles, since what {path} holds does not fit."
    warnings.warn(format_problems(headline, problems, fix), SavedStepWarning, stacklevel=stacklevel)
