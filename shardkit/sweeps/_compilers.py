"""Where a case is compiled: here, on devices that are there, or in a child for absent ones."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, SweepError, count, format_problems, raise_all
from ..hardware import identify_chip
from ..mesh import Target
from ..planner import Network
from ..report import Report
from ..step import CompiledStep, StepSpec
from ..targets import Source, compile_for
from ._case import Case

Factory = Callable[..., CompiledStep | StepSpec]
"""`factory(mesh, accumulate=2, remat="full")`; with a target the mesh is a `MeshSpec`."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A compiled case.

    Attributes:
      report: of the step; its own `seconds` are those of tracing, lowering and compiling.
      seconds: wall time from the call of the factory to the report, a child's start included.
      spec: what was compiled.
      step: None where it was compiled in another process.
    """

    report: Report
    seconds: float
    spec: StepSpec
    step: CompiledStep | None = None


class Compiler(Protocol):
    """Compiles one case after the other."""

    @property
    def on(self) -> Mapping[str, Any]:
        """What is known of the devices before anything is compiled."""
        ...

    @property
    def network(self) -> Network | None:
        """Links and chip of the devices; None where the hardware table has no such device."""
        ...

    def compile(self, case: Case) -> Made:
        """Compiles a case; raises whatever is wrong with it."""
        ...


@dataclasses.dataclass(frozen=True)
class Here:
    """Compiles in this process for its own devices, the first ones of them."""

    factory: Factory
    present: Sequence[Any]

    @property
    def on(self) -> Mapping[str, Any]:
        """The devices' own names."""
        device = self.present[0]
        own = {"platform": device.platform, "device_kind": device.device_kind}
        return {"target": "local", **own}

    @property
    def network(self) -> Network | None:
        """Links of the devices' own kind."""
        chip = identify_chip(self.present[0].device_kind)
        return Network(chip) if chip else None

    def compile(self, case: Case) -> Made:
        """Builds the mesh, calls the factory and reads what it made.

        Raises:
          ShardkitError: the case is illegal, or the factory made another step than it was asked.
        """
        start = time.perf_counter()
        first = None if case.devices == len(self.present) else self.present[: case.devices]
        mesh = case.mesh_spec.build(devices=first)
        step = _compiled(self.factory(mesh, accumulate=case.accumulate, remat=case.remat), mesh)
        check_asked(step.spec, case, step.mesh.shape)
        report = step.report()
        return Made(report, time.perf_counter() - start, step.spec, step)


@dataclasses.dataclass(frozen=True)
class Absent:
    """Compiles for devices that only their compiler knows, each case in a child process.

    Attributes:
      factory: declares a case for a `MeshSpec`.
      source: case → what the child is to load.
      target: what it compiles for.
      timeout: seconds after which a child is ended.
    """

    factory: Factory
    source: Callable[[Case], Source]
    target: str
    timeout: float

    @property
    def on(self) -> Mapping[str, Any]:
        """The target."""
        return {"target": str(Target.parse(self.target))}

    @property
    def network(self) -> Network | None:
        """Links of the target."""
        target = Target.parse(self.target)
        return Network.of(target) if target.chip else None

    def compile(self, case: Case) -> Made:
        """Declares the case here, where what it raises is seen at once, and waits for a child.

        Raises:
          ShardkitError: the case is illegal, or its compiler crashed.
        """
        start = time.perf_counter()
        spec = spec_of_case(self.factory, case)
        report = compile_for(self.source(case), self.target, timeout=self.timeout)
        return Made(report, time.perf_counter() - start, spec)


def spec_of_case(factory: Factory, case: Case) -> StepSpec:
    """The spec that a factory makes of a case, for a mesh that another process builds.

    Raises:
      StepError: it returns no spec, or another one than it was asked for.
    """
    made = factory(case.mesh_spec, accumulate=case.accumulate, remat=case.remat)
    if not isinstance(made, StepSpec):
        why = f"returned {type(made).__name__}; a compile elsewhere takes a StepSpec"
        fix = "return sk.StepSpec(loss_fn=..., optimizer=..., init=..., batch=..., strategy=...)"
        raise StepError(
            format_problems("There is nothing to compile.", [Problem("factory", why)], fix)
        )
    check_asked(made, case)
    return made


def present_devices(wanted: Sequence[int]) -> Sequence[Any]:
    """The process's devices, if they are as many as the largest mesh wants.

    Raises:
      SweepError: there are fewer.
    """
    devices = jax.devices()
    problems = [
        Problem(f"devices={n}", f"this process has {count(len(devices), 'device')}")
        for n in wanted
        if n > len(devices)
    ]
    most = max(wanted, default=0)
    fix = (
        f"sk.simulate_devices({most}) right after the imports, or --set devices=cpu:{most} for a "
        "config; or target= for absent ones"
    )
    raise_all(SweepError, "The devices are not there.", problems, fix)
    return devices


def _compiled(made: Any, mesh: Mesh) -> CompiledStep:
    if isinstance(made, StepSpec):
        return made.compile(mesh)
    if isinstance(made, CompiledStep):
        return made
    problem = Problem("factory", f"returned {type(made).__name__}")
    fix = "return sk.compile_step(..., mesh=mesh, accumulate=accumulate, remat=remat)"
    raise StepError(format_problems("The factory makes no step.", [problem], fix))


def check_asked(made: StepSpec, case: Case, sizes: Mapping[str, int] | None = None) -> None:
    """Refuses a step that is not the one that was asked for, whose row would be a lie.

    Args:
      made: the spec of the step.
      case: what was asked.
      sizes: of the mesh that it was compiled for; None where it is not yet compiled.

    Raises:
      StepError: naming what the factory ignored.
    """
    pairs = {
        "mesh": (case.sizes if sizes is None else dict(sizes), case.sizes),
        "accumulate": (made.accumulate.micro_batches, case.accumulate),
        "remat": (made.strategy.remat, case.remat),
    }
    problems = [
        Problem(name, f"was asked to be {asked!r}, the step has {got!r}", f"{name}={name}")
        for name, (got, asked) in pairs.items()
        if got != asked
    ]
    raise_all(StepError, "The factory ignores what it is called with.", problems)
