"""Compiles cases: in this process on its devices, or in a child process for absent ones."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, SweepError, count, format_problems, raise_all
from ..hardware import identify_chip
from ..mesh import Target
from ..planner import Network
from ..report import Report
from ..step import CompiledStep, StepSpec
from ..targets import StepSource, compile_for
from ._case import SweepCase

Factory = Callable[..., CompiledStep | StepSpec]
"""`factory(mesh, accumulate=2, remat="full")`; with a target the mesh is a `MeshSpec`."""


@dataclasses.dataclass(frozen=True)
class CompiledCase:
    """A compiled case."""

    report: Report  # of the step; `report.seconds` are those of tracing, lowering and compiling
    seconds: float  # wall time from the call of the factory to the report, a child's start included
    spec: StepSpec  # the spec of the step
    step: CompiledStep | None = None  # None if it was compiled in another process


@dataclasses.dataclass(frozen=True)
class LocalCompiler:
    """Compiles in this process, for the first of its devices."""

    factory: Factory  # declares or compiles a case for a mesh
    present: Sequence[Any]  # the process's devices

    @property
    def device_info(self) -> Mapping[str, Any]:
        """Platform and kind as the devices name them."""
        device = self.present[0]
        return {"target": "local", "platform": device.platform, "device_kind": device.device_kind}

    @property
    def network(self) -> Network | None:
        """Links of the devices' kind; None if the hardware table does not have them."""
        chip = identify_chip(self.present[0].device_kind)
        return Network(chip) if chip else None

    def compile(self, case: SweepCase) -> CompiledCase:
        """Compiles what the factory makes; raises ShardkitError for a case that is illegal."""
        start = time.perf_counter()
        devices = None if case.devices == len(self.present) else self.present[: case.devices]
        mesh = case.mesh_spec.build(devices=devices)
        step = _compile(self.factory(mesh, accumulate=case.accumulate, remat=case.remat), mesh)
        check_factory_result(step.spec, case, step.mesh.shape)
        report = step.report()
        return CompiledCase(report, time.perf_counter() - start, step.spec, step)


@dataclasses.dataclass(frozen=True)
class TargetCompiler:
    """Compiles for absent devices, each case in a child process."""

    factory: Factory  # declares a case for a `MeshSpec`
    source: Callable[[SweepCase], StepSource]  # case → what the child loads
    target: str  # the devices
    timeout: float  # seconds after which a child is killed

    @property
    def device_info(self) -> Mapping[str, Any]:
        """The target."""
        return {"target": str(Target.parse(self.target))}

    @property
    def network(self) -> Network | None:
        """Links of the target; None if the hardware table does not have them."""
        target = Target.parse(self.target)
        return Network.of(target) if target.chip else None

    def compile(self, case: SweepCase) -> CompiledCase:
        """Declares the case here, so that its errors show at once, and compiles it in a child."""
        start = time.perf_counter()
        spec = spec_of_case(self.factory, case)
        report = compile_for(self.source(case), self.target, timeout=self.timeout)
        return CompiledCase(report, time.perf_counter() - start, spec)


CaseCompiler = LocalCompiler | TargetCompiler


def spec_of_case(factory: Factory, case: SweepCase) -> StepSpec:
    """Calls a factory for a mesh of another process; raises StepError unless it gives the case."""
    spec = factory(case.mesh_spec, accumulate=case.accumulate, remat=case.remat)
    if not isinstance(spec, StepSpec):
        why = f"returned {type(spec).__name__}; a compile elsewhere takes a StepSpec"
        fix = "return sk.StepSpec(loss_fn=..., optimizer=..., init=..., batch=..., strategy=...)"
        raise StepError.of("There is nothing to compile.", "factory", why, fix)
    check_factory_result(spec, case)
    return spec


def present_devices(counts: Sequence[int]) -> Sequence[Any]:
    """The process's devices; raises SweepError if they are fewer than the largest mesh has."""
    devices = jax.devices()
    problems = [
        Problem(f"devices={n}", f"this process has {count(len(devices), 'device')}")
        for n in counts
        if n > len(devices)
    ]
    most = max(counts, default=0)
    fix = (
        f"sk.simulate_devices({most}) right after the imports, or --set devices=cpu:{most} for a "
        "config; or target= for absent ones"
    )
    raise_all(SweepError, "The devices are not available.", problems, fix)
    return devices


def _compile(declared: Any, mesh: Mesh) -> CompiledStep:
    if isinstance(declared, StepSpec):
        return declared.compile(mesh)
    if isinstance(declared, CompiledStep):
        return declared
    problem = Problem("factory", f"returned {type(declared).__name__}")
    fix = "return sk.compile_step(..., mesh=mesh, accumulate=accumulate, remat=remat)"
    raise StepError(format_problems("The factory does not return a step.", [problem], fix))


def check_factory_result(
    spec: StepSpec, case: SweepCase, sizes: Mapping[str, int] | None = None
) -> None:
    """Raises StepError with the options of a case that its factory ignores.

    `sizes` are those of the mesh that it was compiled for; None if it is not compiled yet.
    """
    pairs = {
        "mesh": (case.sizes if sizes is None else dict(sizes), case.sizes),
        "accumulate": (spec.accumulate.micro_batches, case.accumulate),
        "remat": (spec.strategy.remat, case.remat),
    }
    problems = [
        Problem(name, f"is {asked!r} in the case, the step has {got!r}", f"{name}={name}")
        for name, (got, asked) in pairs.items()
        if got != asked
    ]
    raise_all(StepError, "The factory ignores its arguments.", problems)
