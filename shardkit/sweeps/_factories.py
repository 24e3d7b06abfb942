"""Steps by case: of a config file, of a spec, or of a function."""

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

# What a sweep itself sets, and what changes no figure of a step.
_SET = ("name", "mesh", "devices", "train")
_NO_FACTORY = "There is no factory."


@dataclasses.dataclass(frozen=True)
class ConfigFactory:
    """The step of a config, laid out by its strategy and the ready ones of further axes.

    Attributes:
      name: path of the config file, "" for the default one.
      overrides: `path.to.field=value`.
    """

    name: str = ""
    overrides: tuple[str, ...] = ()

    @functools.cached_property
    def config(self) -> Config:
        """The config, loaded once: what becomes of the file while a sweep runs changes no row."""
        return load_config(self.name or None, list(self.overrides))

    @functools.cached_property
    def steps(self) -> SpecFactory:
        """The steps of the config's spec."""
        return SpecFactory(self.config.step_spec())

    def __call__(self, mesh: Mesh | MeshSpec, *, accumulate: int, remat: str) -> StepSpec:
        """The spec of a case."""
        return self.steps(mesh, accumulate=accumulate, remat=remat)

    def axes(self, named: Sequence[str]) -> tuple[str, ...]:
        """Mesh axes of a sweep: those named, by default those of the config's mesh.

        Raises:
          ConfigError: an axis is neither in the config's mesh, nor a kind of parallelism.
        """
        own = tuple(self.config.mesh.axes)
        fix = f"--axes {','.join(own)}, or a strategy and a mesh with the axis in the config"
        check_axes(named, (*own, *ready_strategies()), fix)
        return tuple(named or own)

    def idle(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes that the config's strategy asks for beside those of a sweep, of size 1 in it."""
        return self.steps.idle(axes)

    def record(self) -> dict[str, Any]:
        """What decides the step, apart from what a sweep varies, as plain values."""
        fields = to_record(self.config)
        kept = {name: value for name, value in fields.items() if name not in _SET}
        varied = ("accumulate", "remat")
        layout = {k: v for k, v in kept["strategy"].items() if k not in varied}
        return {**kept, "strategy": layout}


Declared = ConfigFactory | SpecFactory
Steps = Factory | Declared
"""What makes the steps of a sweep."""


def default_options(factory: Steps) -> tuple[int, str]:
    """Micro-batches and checkpoint policy of a sweep that names none: a spec's own."""
    if isinstance(factory, SpecFactory):
        return factory.spec.accumulate.micro_batches, factory.spec.remat
    return 1, "none"


def make_child_source(factory: Steps, case: SweepCase) -> StepSource:
    """What a child process loads to declare a case.

    Raises:
      SweepError: the factory has no name by which another process could import it.
    """
    asked = {"mesh": case.sizes, "accumulate": case.accumulate, "remat": case.remat}
    of: dict[str, Any]
    if isinstance(factory, ConfigFactory):
        of = {"config": factory.name, "overrides": list(factory.overrides)}
        of["record"] = factory.record()
    else:
        of = {"function": importable_name(factory)}
    return StepSource("shardkit.sweeps:declared", arguments={**of, **asked})


def display_name(factory: Steps) -> str:
    """A name for people, which also tells one sweep from another."""
    if isinstance(factory, ConfigFactory):
        return Path(factory.name).name or "the default config"
    if isinstance(factory, SpecFactory):
        return factory.name
    # What is called need not be a function: a partial has neither name.
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__name__)}"


def importable_name(factory: Factory) -> str:
    """Returns `module:function`.

    Raises:
      SweepError: it is no function at the top of a module that can be imported.
    """
    fix = "def factory(mesh, *, accumulate, remat) at the top of a module of its own"
    if isinstance(factory, SpecFactory):
        why = "was made in this process; another one compiles it, and needs a name to import"
        fix += ', which returns the StepSpec; then sk.sweep("MODULE:factory", target=...)'
        problem = Problem(f"spec of {factory.name}", why, fix)
        raise SweepError(format_problems("The spec cannot be sent to a target.", [problem]))
    name = display_name(factory)
    module, _, function = name.partition(":")
    if module != "__main__" and function.isidentifier() and inspect.isfunction(factory):
        return name
    why = "another process compiles it, and cannot import it by a name"
    problem = Problem(f"factory {name}", why, fix)
    raise SweepError(format_problems("The factory cannot be sent to a target.", [problem]))


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

    Args:
      mesh: axis → size.
      accumulate: micro-batches.
      remat: name of a checkpoint policy.
      config: path of a config file, "" for the default one.
      overrides: for the config.
      record: what the config was when the sweep began.
      function: `module:function` in its stead.

    Raises:
      SweepError: the config is no longer what it was.
      StepError: the function returns no spec.
    """
    made = _import_factory(function) if function else ConfigFactory(config, tuple(overrides))
    if isinstance(made, ConfigFactory) and record != json.loads(json.dumps(made.record())):
        why = "was changed while the sweep ran; rows of two configs say nothing beside each other"
        problem = Problem(display_name(made), why, "the config of before, or another --out")
        raise SweepError(format_problems("The config is another one.", [problem]))
    case = SweepCase(tuple(mesh.items()), accumulate, remat)
    return spec_of_case(made, case), case.mesh_spec


def make_factory(given: Any) -> Steps:
    """What makes the steps of a sweep: a spec, a function or its name, or a config by its path.

    Args:
      given: a spec, a factory, `module:function`, or the path of a config file.

    Raises:
      ConfigError: there is no such function, its module cannot be imported, or it cannot be called
        as a factory is.
    """
    if isinstance(given, StepSpec):
        return SpecFactory(given)
    if isinstance(given, CompiledStep):
        check_step_spec(given, ConfigError, _NO_FACTORY)
    named = isinstance(given, str | Path)
    if named and not StepSource(str(given)).is_function:
        return ConfigFactory(str(given))
    factory: Any = _import_factory(str(given)) if named else given
    _check_callable(factory)
    return factory


def _check_callable(factory: Any) -> None:
    if not callable(factory):
        _refuse(repr(factory), f"is no function, but {type(factory).__name__}")
    if isinstance(factory, ConfigFactory | SpecFactory):
        return
    try:
        inspect.signature(factory).bind(None, accumulate=1, remat="none")
    except TypeError as error:
        _refuse(display_name(cast(Factory, factory)), f"cannot be called: {error}")


def _import_factory(name: str) -> Factory:
    try:
        return StepSource(name).imported()
    except ShardkitError:
        raise
    except Exception as error:
        _refuse(name, f"its module raised {type(error).__name__}: {error}")


def _refuse(name: str, why: str) -> NoReturn:
    fix = "def factory(mesh, *, accumulate, remat) -> sk.StepSpec, as module:factory"
    raise ConfigError(format_problems(_NO_FACTORY, [Problem(name, why)], fix))
