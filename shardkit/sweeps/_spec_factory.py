"""The step of a spec on any mesh of a sweep."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.tree import list_leaves
from .._core.types import Loss
from ..mesh import MeshSpec
from ..parallel import Strategy, known_kinds
from ..rules import AxisRules, PathRules, Rule, ShardLargest, axes_of, list_rules
from ..step import StepSpec


@dataclasses.dataclass(frozen=True)
class SpecFactory:
    """The step of a spec, laid out by its strategy and the ready ones of further axes.

    Attributes:
      spec: the step; a case sets its `accumulate` and `remat`.
    """

    spec: StepSpec

    def __call__(self, mesh: Mesh | MeshSpec, *, accumulate: int, remat: str) -> StepSpec:
        """The spec of a case."""
        strategy = _with_axes(self.spec.strategy, mesh.shape)
        micro = dataclasses.replace(self.spec.accumulate, micro_batches=accumulate)
        return self.spec.replace(strategy=strategy, accumulate=micro, remat=remat)

    @property
    def name(self) -> str:
        """`module:function` of the loss, for people."""
        loss: Any = self.spec.loss_fn
        loss = loss.train if isinstance(loss, Loss) else loss
        return f"{loss.__module__}:{getattr(loss, '__qualname__', type(loss).__name__)}"

    def axes(self, named: Sequence[str]) -> tuple[str, ...]:
        """Mesh axes of a sweep: those named, by default those that the strategy names.

        Raises:
          ConfigError: the strategy is made of ready ones, and an axis is none that they know.
        """
        strategy, own = self.spec.strategy, axis_names(self.spec.strategy)
        known = (*own, *ready()) if strategy.kinds else named
        check_axes(named, known, "| strategies.data(AXIS), or a name of these")
        return tuple(named) or own or plain_axes()

    def idle(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes that the strategy asks for beside those of a sweep, of size 1 in it."""
        strategy = self.spec.strategy
        needed = dict.fromkeys(kind.axis for kind in strategy.kinds) or axis_names(strategy)
        return tuple(axis for axis in needed if axis not in axes)

    def record(self) -> dict[str, Any]:
        """What tells the spec from others and can be said in plain values."""
        return {
            "spec": self.name,
            "batch": [str(leaf) for leaf in list_leaves(self.spec.batch)],
            "mode": self.spec.mode,
            "precision": dataclasses.asdict(self.spec.precision),
            "kinds": [[kind.name, kind.axis] for kind in self.spec.strategy.kinds],
        }


def check_axes(named: Sequence[str], known: Sequence[str], fix: str) -> None:
    """Refuses mesh axes of a sweep that nothing is known of.

    Raises:
      ConfigError: with each of them.
    """
    known = tuple(dict.fromkeys(known))
    problems = [
        Problem(f"axis {axis!r}", f"is none of {', '.join(known)}.{did_you_mean(axis, known)}")
        for axis in named
        if axis not in known
    ]
    raise_all(ConfigError, "The sweep names unknown axes.", problems, fix)


def axis_names(strategy: Strategy) -> tuple[str, ...]:
    """Mesh axes that a strategy names, in the order of its kinds, its batch and its rules.

    >>> rules = PathRules({"w": PartitionSpec("tensor")})
    >>> axis_names(Strategy(params=rules, batch=PartitionSpec("data")))
    ('data', 'tensor')
    """
    batch = strategy.batch
    found = [kind.axis for kind in strategy.kinds]
    found += _of_spec(batch) if isinstance(batch, PartitionSpec) else _of_rule(batch)
    for rule in (strategy.params, strategy.activations, strategy.opt_state, strategy.model_state):
        found += _of_rule(rule) if rule is not None else []
    found += [override.axis for _, override in strategy.overrides]
    return tuple(dict.fromkeys(found))


def _of_rule(rule: Rule) -> list[str]:
    """Mesh axes in the table of a rule; a user's own kind of rule says none."""
    found: list[str] = []
    for one in list_rules(rule):
        match one:
            case PathRules():
                specs = (spec for _, spec in one.table if isinstance(spec, PartitionSpec))
                found += [axis for spec in specs for axis in _of_spec(spec)]
            case AxisRules():
                found += [axis for _, axes in one.table for axis in axes]
            case ShardLargest():
                found += one.axes
    return found


def _of_spec(spec: Iterable[Any]) -> list[str]:
    return [axis for entry in spec for axis in axes_of(entry)]


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
    """The ready strategy that an axis stands for where a spec's strategy has none for it."""
    return {kind.axis: kind.factory for kind in known_kinds() if kind.sweep_by_default}


def plain_axes() -> tuple[str, ...]:
    """Mesh axes whose ready strategies lay out any model: they need no mark in it."""
    marked = {kind.axis for kind in known_kinds() if kind.override}
    return tuple(axis for axis in ready() if axis not in marked)
