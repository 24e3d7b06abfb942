"""Steps by case: from a config file, or from a function that a child process can import."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from jax.sharding import Mesh

from .._errors import (
    ConfigError,
    Problem,
    ShardkitError,
    SweepError,
    did_you_mean,
    format_problems,
    raise_all,
)
from ..config import Config, load_config, to_record
from ..mesh import MeshSpec
from ..parallel import Strategy, known_kinds
from ..run import declare_run
from ..step import Declaration
from ..targets import Source
from ._case import Case
from ._compilers import Factory, declare

# What a sweep itself sets, and what changes no figure of a step.
_SET = ("name", "mesh", "devices", "train")


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

    def __call__(self, mesh: Mesh | MeshSpec, *, accumulate: int, remat: str) -> Declaration:
        """Declares the step of a case."""
        config = self.config
        strategy = _with_axes(config.strategy, mesh.shape)
        micro = strategy.accumulate
        if not isinstance(micro, int):
            micro = dataclasses.replace(micro, steps=accumulate)
        else:
            micro = accumulate
        strategy = dataclasses.replace(strategy, accumulate=micro, remat=remat)
        optimizer = config.optimizer.build(config.train.steps)
        spec = mesh if isinstance(mesh, MeshSpec) else MeshSpec(dcn=None, **dict(mesh.shape))
        made = declare_run(config.model, config.data, spec, strategy, optimizer)
        return dataclasses.replace(made, mesh=mesh, **config.compile.arguments)

    def axes(self, named: Sequence[str]) -> tuple[str, ...]:
        """Mesh axes of a sweep: those named, by default those of the config's mesh.

        Raises:
          ConfigError: an axis is neither in the config's mesh, nor a kind of parallelism.
        """
        config = self.config
        own = tuple(config.mesh.axes)
        known = tuple(dict.fromkeys((*own, *ready())))
        problems = [
            Problem(f"axis {axis!r}", f"is none of {', '.join(known)}.{did_you_mean(axis, known)}")
            for axis in named
            if axis not in known
        ]
        fix = f"--axes {','.join(own)}, or a strategy and a mesh with the axis in the config"
        raise_all(ConfigError, "The sweep names unknown axes.", problems, fix)
        return tuple(named or own)

    def idle(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes that the config's strategy asks for beside those of a sweep, of size 1 in it."""
        needed = dict.fromkeys(kind.axis for kind in self.config.strategy.kinds)
        return tuple(axis for axis in needed if axis not in axes)

    def record(self) -> dict[str, Any]:
        """What decides the step, apart from what a sweep varies, as plain values."""
        fields = to_record(self.config)
        kept = {name: value for name, value in fields.items() if name not in _SET}
        varied = ("accumulate", "remat")
        layout = {k: v for k, v in kept["strategy"].items() if k not in varied}
        return {**kept, "strategy": layout}


def _with_axes(strategy: Strategy, sizes: Mapping[str, int]) -> Strategy:
    """Adds ready strategies for the axes of a mesh that split something and have none.

    A strategy that is its author's own says itself what it does on which axis.
    """
    if not strategy.kinds:
        return strategy
    has, known = {kind.axis for kind in strategy.kinds}, ready()
    for axis, size in sizes.items():
        if size > 1 and axis not in has and axis in known:
            strategy = strategy | known[axis]()
    return strategy


def ready() -> dict[str, Callable[[], Strategy]]:
    """The strategy that a mesh axis stands for where a config declares none for it."""
    return {kind.axis: kind.make for kind in known_kinds() if kind.by_default}


def plain_axes() -> tuple[str, ...]:
    """Those that lay out any model: they need no mark in it."""
    asking = {kind.axis for kind in known_kinds() if kind.region}
    return tuple(axis for axis in ready() if axis not in asking)


def source_of(factory: Factory | ConfigFactory, case: Case) -> Source:
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
        of = {"function": name_of(factory)}
    return Source("shardkit.sweep:declared", arguments={**of, **asked})


def shown_name(factory: Factory | ConfigFactory) -> str:
    """A name for people, which also tells one sweep from another."""
    if isinstance(factory, ConfigFactory):
        return Path(factory.name).name or "the default config"
    # What is called need not be a function: a partial has neither name.
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__name__)}"


def name_of(factory: Factory) -> str:
    """Returns `module:function`.

    Raises:
      SweepError: it is no function at the top of a module that can be imported.
    """
    name = shown_name(factory)
    module, _, function = name.partition(":")
    if module != "__main__" and function.isidentifier() and inspect.isfunction(factory):
        return name
    why = "another process compiles it, and cannot import it by a name"
    fix = "def factory(mesh, *, accumulate, remat) at the top of a module of its own"
    problem = Problem(f"factory {name}", why, fix)
    raise SweepError(format_problems("The factory cannot be sent to a target.", [problem]))


def declared(
    *,
    mesh: Mapping[str, int],
    accumulate: int,
    remat: str,
    config: str = "",
    overrides: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    function: str = "",
) -> Declaration:
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
      StepError: the function returns no declaration.
    """
    made = _imported(function) if function else ConfigFactory(config, tuple(overrides))
    if isinstance(made, ConfigFactory) and record != json.loads(json.dumps(made.record())):
        why = "was changed while the sweep ran; rows of two configs say nothing beside each other"
        problem = Problem(shown_name(made), why, "the config of before, or another --out")
        raise SweepError(format_problems("The config is another one.", [problem]))
    return declare(made, Case(tuple(mesh.items()), accumulate, remat))


def factory_of(given: Any) -> Factory | ConfigFactory:
    """What makes the steps of a sweep: a function itself or its name, or a config by its path.

    Args:
      given: a factory, `module:function`, or the path of a config file.

    Raises:
      ConfigError: there is no such function, its module cannot be imported, or it cannot be called
        as a factory is.
    """
    named = isinstance(given, str | Path)
    if named and not Source(str(given)).is_function:
        return ConfigFactory(str(given))
    factory: Any = _imported(str(given)) if named else given
    _check_callable(factory)
    return factory


def _check_callable(factory: Any) -> None:
    if not callable(factory):
        _refuse(repr(factory), f"is no function, but {type(factory).__name__}")
    if isinstance(factory, ConfigFactory):
        return
    try:
        inspect.signature(factory).bind(None, accumulate=1, remat="none")
    except TypeError as error:
        _refuse(shown_name(cast(Factory, factory)), f"cannot be called: {error}")


def _imported(name: str) -> Factory:
    try:
        return Source(name).imported()
    except ShardkitError:
        raise
    except Exception as error:
        _refuse(name, f"its module raised {type(error).__name__}: {error}")


def _refuse(name: str, why: str) -> NoReturn:
    fix = "def factory(mesh, *, accumulate, remat) -> sk.Declaration, as module:factory"
    raise ConfigError(format_problems("There is no factory.", [Problem(name, why)], fix))
