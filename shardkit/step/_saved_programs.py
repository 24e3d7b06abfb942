"""Executables in a file, by what they were compiled from: a step that starts without compiling.

    step.saved                     a zip file, every member with its checksum
      header.json                  schema, mesh, devices, environment
      6f0c….program                an executable, by `jax.experimental.serialize_executable`
      6f0c….log                    what the compiler printed
      6f0c….lines                  SHA-256 of the source lines that its instructions name

The name of an executable is the SHA-256 of the lowered program, the compiler's options and the
environment. A step that is loaded is traced and lowered as always, and takes the executable of its
name or compiles: one of another model, version, flag or machine has another name and never runs.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, SavedStepWarning, StepError, first_line, format_problems
from .._core.io._files import check_regular, local_path, os_errors_as, write_atomic
from .._core.types import PyTree
from ._jax_cache import loses_order

_SCHEMA, _VERSION, _HEADER = "shardkit.step", 2, "header.json"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_ALLOCATOR")


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
        "processes": str(jax.process_count()),
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


def find_obstacle(mesh: Mesh) -> Problem | None:
    """Returns why executables from a file must not run on a mesh; None if they may.

    Of several processes each has an executable of its own, and one that compiles can wait for
    others that load theirs.
    """
    if jax.process_count() > 1:
        why = "run this step, each an executable of its own"
        return Problem(f"{jax.process_count()} processes", why)
    if loses_order(mesh):
        why = "can deadlock in a program that comes from a file"
        return Problem(f"{mesh.size} CPU devices", why)
    return None


def name_program(lowered: jax.stages.Lowered, options: Mapping[str, Any], mesh: Mesh) -> str:
    """Returns the name of a lowered program's executable, 64 hexadecimal digits."""
    compiled_from = [lowered.as_text(), sorted((k, repr(v)) for k, v in options.items())]
    compiled_from += [sorted(describe_environment(mesh).items()), _VERSION]
    return hashlib.sha256(json.dumps(compiled_from).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class KeptProgram:
    """An executable that can be kept, with what a report of it needs."""

    compiled: jax.stages.Compiled
    messages: str  # what its compiler printed
    # which source lines its instructions name, as `digest_lines` has them; "" if unknown
    lines: str = ""


def digest_lines(lowered: jax.stages.Lowered, callers: Collection[str]) -> str:
    """Returns the SHA-256 of the source lines of a lowered program, 64 hexadecimal digits.

    A comment more in a model moves its lines, and the program stays the same: with its executable,
    old lines would come from a file. `callers` are the lines that led to the compilation, as
    `"model.py":3`; another script that compiles the same step has others.
    """
    lines = set(re.findall(r'loc\(("[^"\n]*":\d+)', lowered.as_text(debug_info=True)))
    return hashlib.sha256("\n".join(sorted(lines.difference(callers))).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class SavedPrograms:
    """The executables of one file."""

    path: pathlib.Path
    mesh: Mesh  # devices and axes that they were compiled for
    environment: Mapping[str, str]  # what they were compiled in; see `describe_environment`
    names: frozenset[str]  # of the executables

    def load(self, name: str, lowered: jax.stages.Lowered) -> KeptProgram | None:
        """Returns an executable; None if the file lacks it.

        A damaged one is reported (`SavedStepWarning`), and None is returned.
        """
        if name not in self.names:
            return None
        try:
            return read_program(self.path, name, lowered, self.mesh)
        except Exception as error:  # zipfile, zlib, pickle and XLA have no common error
            why = f"is damaged: {first_line(error)}"
            warn_stale(self.path, [Problem(f"program {name[:12]}", why)])
            return None

    def store(self, name: str, program: KeptProgram) -> None:
        """Leaves the file as `step.save` wrote it."""


def read_program(
    path: pathlib.Path, name: str, lowered: jax.stages.Lowered, mesh: Mesh
) -> KeptProgram:
    """Reads an executable of a file.

    Raises OSError if the file cannot be read, and an Exception of any type for one that is damaged
    or that another program wrote.
    """
    with _open_zip(path) as file:
        program, log, lines = (file.read(f"{name}.{part}") for part in ("program", "log", "lines"))
    trees, devices = (lowered.in_tree, lowered.out_tree), list(mesh.devices.flat)
    compiled = serialize_executable.deserialize_and_load(program, *trees, execution_devices=devices)
    if not _same_types(compiled.in_avals, lowered.in_avals):
        raise ValueError("the executable takes other arguments")
    return KeptProgram(compiled, log.decode("utf-8", "replace"), lines.decode())


@contextlib.contextmanager
def _open_zip(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """Opens a file for reading; a pipe would be waited for without end."""
    check_regular(path)
    with zipfile.ZipFile(path) as file:
        yield file


def _same_types(a: PyTree, b: PyTree) -> bool:
    a, b = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (a, b))
    return a == b


_UNSAVED, _UNLOADED = "The step cannot be saved.", "The saved step cannot be loaded."


def save_programs(
    path: str | os.PathLike[str], programs: Mapping[str, KeptProgram], mesh: Mesh
) -> None:
    """Writes executables by name into one file, whole or not at all.

    Its folder must exist. Raises StepError if the file cannot be written; the step calls Python,
    which no file holds; or several processes run the step, each of which would need a file of its
    own.
    """
    target = local_path(path, StepError, _UNSAVED)
    if jax.process_count() > 1:
        why = f"{jax.process_count()} processes run this step, each an executable of its own"
        fix = "jax.config.update('jax_compilation_cache_dir', ...) keeps those of all processes"
        raise StepError.of(_UNSAVED, str(target), why, fix)
    header = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "mesh": list(mesh.shape.items()),
        "devices": [device.id for device in mesh.devices.flat],
        "environment": describe_environment(mesh),
        "programs": sorted(programs),
    }
    written = {name: _serialize(program.compiled) for name, program in programs.items()}
    fix = "step.save of a path in a folder that exists and can be written"
    with (
        os_errors_as(StepError, _UNSAVED, str(target), fix),
        write_atomic(target, sync=True) as partial,
        zipfile.ZipFile(partial, "w") as file,
    ):
        file.writestr(_HEADER, json.dumps(header, indent=1))
        for name, program in programs.items():
            file.writestr(f"{name}.program", written[name])
            file.writestr(f"{name}.log", program.messages)
            file.writestr(f"{name}.lines", program.lines)


def _serialize(compiled: jax.stages.Compiled) -> bytes:
    try:
        return serialize_executable.serialize(compiled)[0]
    except Exception as error:  # each backend has its own for what it does not implement
        why = f"cannot be written: {first_line(error)}"
        fix = "a loss without jax.debug.print and callbacks, which call Python of this process; "
        fix += "or a backend of JAX that can write its executables"
        raise StepError.of(_UNSAVED, "the program", why, fix) from error


def open_programs(path: str | os.PathLike[str], mesh: Mesh | None) -> SavedPrograms:
    """Opens a file of executables for a mesh; None for the axes and devices of the file.

    Raises StepError if there is no such file, or it cannot be read and no mesh is given, or its
    devices are not here.
    """
    path = local_path(path, StepError, _UNLOADED)
    try:
        with _open_zip(path) as file:
            header = json.loads(file.read(_HEADER))
        if (header["schema"], header["version"]) != (_SCHEMA, _VERSION):
            raise ValueError(f"has schema {header['schema']!r}, version {header['version']!r}")
        environment = {str(k): str(v) for k, v in header["environment"].items()}
        names = frozenset(map(str, header["programs"]))
        saved_mesh = mesh if mesh is not None else _build_mesh(path, header)
    except StepError:
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError)
        why = "does not exist" if missing else f"is not a saved step: {first_line(error)}"
        if mesh is None or missing:
            other = "spec.compile(mesh)" if missing else "pass mesh=, which compiles the step anew"
            fix = f"step.save({str(path)!r}); or {other}"
            raise StepError.of(_UNLOADED, str(path), why, fix) from None
        warn_stale(path, [Problem(str(path), why)])
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
        raise StepError.of(_UNLOADED, str(path), why, fix)
    devices = np.array([here[n] for n in numbers]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def list_differences(saved: SavedPrograms) -> Iterator[Problem]:
    """What differs between the environment of a file and this process."""
    now = describe_environment(saved.mesh)
    for name in dict.fromkeys([*saved.environment, *now]):
        before, after = saved.environment.get(name, ""), now.get(name, "")
        if before != after:
            yield Problem(name, f"was {before or 'not set'!r}, is {after or 'not set'!r}")


def warn_stale(
    path: pathlib.Path, problems: Sequence[Problem], *, fix: str = "", stacklevel: int = 4
) -> None:
    """Warns that executables of a file are not used; the fix is, by default, to save again.

    `stacklevel` is of the user's call, counted from here: 4 below `open_programs`.
    """
    fix = fix or f"step.save({str(path)!r}) once it has compiled"
    headline = f"The step compiles, since what {path} holds does not fit."
    warnings.warn(format_problems(headline, problems, fix), SavedStepWarning, stacklevel=stacklevel)
