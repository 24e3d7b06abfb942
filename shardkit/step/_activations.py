"""Resolves the logical axes of a model's constraints to shardings, and checks them once traced."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, ShardingError, count, did_you_mean, raise_all
from .._core.tracing import equations
from .._core.tree import Leaf
from ..nn._constrain import GRADIENT_SHARDS, MAPPED, constrain_p, use_resolver
from ..rules import AxisRules, check_spec, format_mesh
from ._ambient import around_init, around_loss
from ._own_constraints import constraint_problems

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Constraint(Leaf):
    """One call of `sk.nn.constrain`, as a leaf whose path is the call."""

    # mesh axes that are manual around the call; along them the shape is one device's
    inside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Activations:
    """Resolves the logical axes of `sk.nn.constrain`, for one step."""

    mesh: Mesh
    rules: AxisRules | None  # logical axes → mesh axes; None if the strategy has no such table
    # mesh axes that separate gradient shards, and so split nothing inside of one
    shard_axes: tuple[str, ...]

    def __call__(
        self, names: Names, shape: tuple[int, ...], inside: tuple[str, ...] = ()
    ) -> NamedSharding | None:
        """Returns the sharding of a constraint; None if no mesh axis can split it."""
        if self.mesh.size == 1 or set(inside) >= set(self.mesh.axis_names):
            return None
        return NamedSharding(self.mesh, self.spec(names, inside))

    def spec(self, names: Names, inside: tuple[str, ...] = ()) -> PartitionSpec:
        """Returns the spec of named dims; dims that a `jax.vmap` added are unconstrained.

        Mesh axes `inside` are manual around it, and so split nothing.
        """
        inside = (*inside, *self.shard_axes) if GRADIENT_SHARDS in names else inside
        entries: list[Any] = []
        for name in names:
            if name == MAPPED:
                entries.append(PartitionSpec.UNCONSTRAINED)
            elif name == GRADIENT_SHARDS:
                entries.append(self.shard_axes)
            else:
                axes = self.rules.mesh_axes(name) if self.rules else ()
                entries.append(tuple(axis for axis in axes if axis not in inside) or None)
        return PartitionSpec(*entries)

    @contextlib.contextmanager
    def around_init(self) -> Iterator[None]:
        """Traces and lowers `init` under this mesh."""
        with around_init(self.mesh), use_resolver(self):
            yield

    @contextlib.contextmanager
    def around_loss(self) -> Iterator[None]:
        """Traces and lowers a loss under this mesh, and these rules for flax's names too."""
        with around_loss(self.mesh, self.rules), use_resolver(self):
            yield

    def check(self, jaxpr: core.ClosedJaxpr) -> None:
        """Raises ShardingError with every constraint of a traced step that cannot be met."""
        unique = dict.fromkeys(constraints(jaxpr.jaxpr))
        problems = [p for leaf in unique for p in dict.fromkeys(self._problems(leaf))]
        problems += dict.fromkeys(constraint_problems(jaxpr.jaxpr, self.mesh))
        failed, mesh = count(len(problems), "constraint"), format_mesh(self.mesh.shape)
        raise_all(ShardingError, f"{failed} cannot be met on mesh {mesh}.", problems)

    def _problems(self, leaf: Constraint) -> list[Problem]:
        assert leaf.axes is not None
        names = [name for name in leaf.axes if name not in (None, GRADIENT_SHARDS, MAPPED)]
        known = [name for name, _ in self.rules.table] if self.rules else []
        unknown = [name for name in names if name not in known]
        if unknown and self.rules is None:
            why = "the strategy has no table of activations"
            table = ", ".join(f'"{name}": None' for name in names)
            return [Problem(str(leaf), why, f"Strategy(activations=sk.AxisRules({{{table}}}))")]
        if unknown:
            return [
                Problem(
                    str(leaf),
                    f"activations do not list logical axis {name!r}."
                    + did_you_mean(str(name), known),
                    f"strategy.with_names(activations={{{name!r}: None}}), or a mesh axis",
                )
                for name in unknown
            ]
        spec = self.spec(leaf.axes, leaf.inside)
        spec = PartitionSpec(*(None if e is PartitionSpec.UNCONSTRAINED else e for e in spec))
        table = ", ".join(f"{name!r}: None" for name in dict.fromkeys(names))
        fix = f"sizes that divide, or strategy.with_names(activations={{{table}}}) for one of these"
        problems = check_spec(leaf, spec, self.mesh.shape, "activations")
        return [dataclasses.replace(problem, fix=fix) for problem in problems]


@dataclasses.dataclass(frozen=True)
class SpecsInLoss:
    """Resolves the logical axes of activations as the loss sees them."""

    activations: Activations
    per_shard: bool  # whether the loss sees one gradient shard, without the dim over the shards
    # `(conventional, the model's)` logical names, as `Strategy.names`
    renamed: tuple[tuple[str, str], ...] = ()

    def __call__(self, names: Names) -> PartitionSpec:
        """Returns the spec of an activation with one logical name per dim, conventional or not."""
        model_names = dict(self.renamed)
        names = tuple(model_names.get(name, name) if name else None for name in names)
        if not self.per_shard:
            return self.activations.spec(names)
        return PartitionSpec(*tuple(self.activations.spec((GRADIENT_SHARDS, *names)))[1:])


def constraints(jaxpr: core.Jaxpr) -> Iterator[Constraint]:
    """Every constraint of a jaxpr and its inner jaxprs."""
    for eqn in equations(jaxpr):
        if eqn.primitive is constrain_p and eqn.params["finer"] is None:
            names = eqn.params["names"]
            written = ", ".join(repr(n) for n in names if n not in (GRADIENT_SHARDS, MAPPED))
            aval: Any = eqn.invars[0].aval
            shape, inside = tuple(aval.shape), eqn.params["inside"]
            yield Constraint(f"constrain({written})", shape, aval.dtype, names, inside)
