"""Makes the step of a case: from a config file, a spec, or a function."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from jax.sharding import Mesh

from .._core.errors import ConfigError, Problem, ShardkitError, SweepError, format_problems
from ..config import Config, load_config, to_record
from ..mesh import MeshSpec
from ..step import CompiledStep, StepSpec, check_step_spec
from ..targets import StepSource
from ._case import SweepCase
from ._compilers import Factory, spec_of_case
from ._spec_factory import SpecFactory, check_axes, ready_strategies

# Fields that a sweep sets itself, or that change no figure of a step.
_IGNORED = ("name", "mesh", "devices", "train")
_NO_FACTORY = "The sweep has no factory."


@dataclasses.dataclass(frozen=True)
class ConfigFactory:
    """The step of a config, with built-in strategies for axes that its own does not split."""

    name: str = ""  # path of the config file, "" for the default one
    overrides: tuple[str, ...] = ()  # `path.to.field=value`

    @functools.cached_property
    def config(self) -> Config:
        """The config, loaded once: an edit of the file while a sweep runs changes no row."""
        return load_config(self.name or None, list(self.overrides))

    @functools.cached_property
    def steps(self) -> SpecFactory:
        """The steps of the config's spec."""
        return SpecFactory(self.config.step_spec())

    def __call__(self, mesh: Mesh | MeshSpec, *, accumulate: int, remat: str) -> StepSpec:
        """The spec of a case."""
        return self.steps(mesh, accumulate=accumulate, remat=remat)

    def select_axes(self, named: Sequence[str]) -> tuple[str, ...]:
        """Mesh axes of a sweep: `named`, by default those of the config's mesh.

        Raises:
          ConfigError: an axis is not in the config's mesh and has no built-in strategy.
        """
        own = tuple(self.config.mesh.axes)
        fix = f"--axes {','.join(own)}, or a strategy and a mesh with the axis in the config"
        check_axes(named, (*own, *ready_strategies()), fix)
        return tuple(named or own)

    def unit_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes that the config's strategy needs and a sweep does not name; they have size 1."""
        return self.steps.unit_axes(axes)

    def record(self) -> dict[str, Any]:
        """The config's fields that a sweep does not vary, as plain values."""
        fields = {k: v for k, v in to_record(self.config).items() if k not in _IGNORED}
        varied = ("accumulate", "remat")
        strategy = {k: v for k, v in fields["strategy"].items() if k not in varied}
        return {**fields, "strategy": strategy}


Declared = ConfigFactory | SpecFactory
Steps = Factory | Declared
"""Anything that makes the steps of a sweep."""


def default_options(factory: Steps) -> tuple[int, str]:
    """Micro-batches and checkpoint policy if a sweep names none: those of a spec, else 1, none."""
    if isinstance(factory, SpecFactory):
        return factory.spec.accumulate.micro_batches, factory.spec.remat
    return 1, "none"


def make_child_source(factory: Steps, case: SweepCase) -> StepSource:
    """The source that a child declares a case from; raises SweepError if it cannot import it."""
    options = {"mesh": case.sizes, "accumulate": case.accumulate, "remat": case.remat}
    arguments: dict[str, Any]
    if isinstance(factory, ConfigFactory):
        arguments = {"config": factory.name, "overrides": list(factory.overrides)}
        arguments["record"] = factory.record()
    else:
        arguments = {"function": importable_name(factory)}
    return StepSource("shardkit.sweeps:declare_case", arguments={**arguments, **options})


def display_name(factory: Steps) -> str:
    """A readable name of a factory, also part of a sweep's identity."""
    if isinstance(factory, ConfigFactory):
        return Path(factory.name).name or "the default config"
    if isinstance(factory, SpecFactory):
        return factory.name
    # A callable need not be a function: a partial has no `__qualname__`.
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__name__)}"


def importable_name(factory: Factory) -> str:
    """Returns `module:function`; raises SweepError unless a module has it at its top."""
    fix = "def factory(mesh, *, accumulate, remat) at the top of a module of its own"
    if isinstance(factory, SpecFactory):
        why = "is an object of this process; the child that compiles it imports it by name"
        fix += ', which returns the StepSpec; then sk.sweep("MODULE:factory", target=...)'
        problem = Problem(f"spec of {factory.name}", why, fix)
        raise SweepError(format_problems("The spec cannot be sent to a target.", [problem]))
    name = display_name(factory)
    module, _, function = name.partition(":")
    if module != "__main__" and function.isidentifier() and inspect.isfunction(factory):
        return name
    why = "the child that compiles it cannot import it by name"
    raise SweepError.of("The factory cannot be sent to a target.", f"factory {name}", why, fix)


def declare_case(
    *,
    mesh: Mapping[str, int],
    accumulate: int,
    remat: str,
    config: str = "",
    overrides: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    function: str = "",
) -> tuple[StepSpec, MeshSpec]:
    """Declares a case in a child process, from plain values.

    The factory is a config file ("" for the default one) with its overrides, or `module:function`.
    `record` is `ConfigFactory.record` when the sweep began: SweepError if the config was changed
    since. Raises StepError if the function does not return a spec.
    """
    factory = _import_factory(function) if function else ConfigFactory(config, tuple(overrides))
    if isinstance(factory, ConfigFactory) and record != json.loads(json.dumps(factory.record())):
        why = "was changed while the sweep ran; rows of two configs cannot be compared"
        fix = "restore the config, or another --out"
        raise SweepError.of("The config was changed.", display_name(factory), why, fix)
    case = SweepCase(tuple(mesh.items()), accumulate, remat)
    return spec_of_case(factory, case), case.mesh_spec


def make_factory(source: Any) -> Steps:
    """Makes the factory of a sweep from a spec, a function or its name, or the path of a config.

    Raises ConfigError if the function does not exist, its module cannot be imported, or it cannot
    be called as a factory is.
    """
    if isinstance(source, StepSpec):
        return SpecFactory(source)
    if isinstance(source, CompiledStep):
        check_step_spec(source, ConfigError, _NO_FACTORY)
    is_name = isinstance(source, str | Path)
    if is_name and not StepSource(str(source)).is_function:
        return ConfigFactory(str(source))
    factory: Any = _import_factory(str(source)) if is_name else source
    _check_callable(factory)
    return factory


def _check_callable(factory: Any) -> None:
    if not callable(factory):
        _refuse(repr(factory), f"is not a function, but {type(factory).__name__}")
    if isinstance(factory, ConfigFactory | SpecFactory):
        return
    try:
        inspect.signature(factory).bind(None, accumulate=1, remat="none")
    except TypeError as error:
        _refuse(display_name(cast(Factory, factory)), f"cannot be called: {error}")


def _import_factory(name: str) -> Factory:
    try:
        return StepSource(name).import_function()
    except ShardkitError:
        raise
    except Exception as error:
        _refuse(name, f"its module raised {type(error).__name__}: {error}")


def _refuse(name: str, why: str) -> NoReturn:
    fix = "def factory(mesh, *, accumulate, remat) -> sk.StepSpec, as module:factory"
    raise ConfigError.of(_NO_FACTORY, name, why, fix)
