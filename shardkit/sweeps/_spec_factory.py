"""Makes the step of a spec for any mesh of a sweep."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.tree import list_leaves
from .._core.types import Loss
from ..mesh import MeshSpec
from ..parallel import Strategy, axis_names, known_kinds
from ..step import StepSpec


@dataclasses.dataclass(frozen=True)
class SpecFactory:
    """The step of a spec, with built-in strategies for axes that its own does not split."""

    spec: StepSpec  # the step; a case sets its `accumulate` and `remat`

    def __call__(self, mesh: Mesh | MeshSpec, *, accumulate: int, remat: str) -> StepSpec:
        """The spec of a case."""
        strategy = _add_ready_strategies(self.spec.strategy, mesh.shape)
        micro = dataclasses.replace(self.spec.accumulate, micro_batches=accumulate)
        return self.spec.replace(strategy=strategy, accumulate=micro, remat=remat)

    @property
    def name(self) -> str:
        """`module:function` of the loss."""
        loss: Any = self.spec.loss_fn
        loss = loss.train if isinstance(loss, Loss) else loss
        return f"{loss.__module__}:{getattr(loss, '__qualname__', type(loss).__name__)}"

    def select_axes(self, named: Sequence[str]) -> tuple[str, ...]:
        """Mesh axes of a sweep: `named`, else the strategy's; raises ConfigError if it has none."""
        strategy, own = self.spec.strategy, axis_names(self.spec.strategy)
        known = (*own, *ready_strategies()) if strategy.kinds else named
        check_axes(named, known, "| strategies.data(AXIS), or a name of these")
        return tuple(named) or own or plain_axes()

    def unit_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes that the strategy needs and a sweep does not name; they have size 1."""
        strategy = self.spec.strategy
        needed = dict.fromkeys(kind.axis for kind in strategy.kinds) or axis_names(strategy)
        return tuple(axis for axis in needed if axis not in axes)

    def record(self) -> dict[str, Any]:
        """The fields of the spec that are plain values, to distinguish it from others."""
        return {
            "spec": self.name,
            "batch": [str(leaf) for leaf in list_leaves(self.spec.batch)],
            "mode": self.spec.mode,
            "precision": dataclasses.asdict(self.spec.precision),
            "kinds": [[kind.name, kind.axis] for kind in self.spec.strategy.kinds],
        }


def check_axes(named: Sequence[str], known: Sequence[str], fix: str) -> None:
    """Raises ConfigError with each mesh axis of a sweep that is not known."""
    known = tuple(dict.fromkeys(known))
    problems = [
        Problem(f"axis {axis!r}", f"is not one of {', '.join(known)}.{did_you_mean(axis, known)}")
        for axis in named
        if axis not in known
    ]
    raise_all(ConfigError, "The sweep names unknown axes.", problems, fix)


def _add_ready_strategies(strategy: Strategy, sizes: Mapping[str, int]) -> Strategy:
    """Adds built-in strategies for the axes of a mesh that have several devices and no kind.

    A strategy without kinds is a user's own, and declares itself what each axis splits.
    """
    if not strategy.kinds:
        return strategy
    present, known = {kind.axis for kind in strategy.kinds}, ready_strategies()
    for axis, size in sizes.items():
        if size > 1 and axis not in present and axis in known:
            strategy = strategy | known[axis]().renamed_like(strategy)
    return strategy


def ready_strategies() -> dict[str, Callable[[], Strategy]]:
    """Mesh axis → the built-in strategy that a sweep adds for it."""
    return {kind.axis: kind.factory for kind in known_kinds() if kind.sweep_by_default}


def plain_axes() -> tuple[str, ...]:
    """Mesh axes whose built-in strategies work with any model: they need no marked region."""
    marked = {kind.axis for kind in known_kinds() if kind.override}
    return tuple(axis for axis in ready_strategies() if axis not in marked)
