"""The mesh axes that a strategy names."""

from collections.abc import Iterable
from typing import Any

from jax.sharding import PartitionSpec

from ..rules import AxisRules, PathRules, Rule, ShardLargest, axes_of, list_rules
from ._strategy import Strategy


def axis_names(strategy: Strategy) -> tuple[str, ...]:
    """Mesh axes that a strategy names, in the order of its kinds, its batch and its rules.

    >>> rules = PathRules({"w": PartitionSpec("tensor")})
    >>> axis_names(Strategy(params=rules, batch=PartitionSpec("data")))
    ('data', 'tensor')
    """
    batch = strategy.batch
    axes = [kind.axis for kind in strategy.kinds]
    axes += _axes_of_spec(batch) if isinstance(batch, PartitionSpec) else _axes_of_rule(batch)
    for rule in (strategy.params, strategy.activations, strategy.opt_state, strategy.model_state):
        axes += _axes_of_rule(rule) if rule is not None else []
    axes += [override.axis for _, override in strategy.overrides]
    return tuple(dict.fromkeys(axes))


def _axes_of_rule(rule: Rule) -> list[str]:
    """Mesh axes in the tables of a rule; none are known of a user's own kind of rule."""
    axes: list[str] = []
    for part in list_rules(rule):
        match part:
            case PathRules():
                specs = (spec for _, spec in part.table if isinstance(spec, PartitionSpec))
                axes += [axis for spec in specs for axis in _axes_of_spec(spec)]
            case AxisRules():
                axes += [axis for _, split in part.table for axis in split]
            case ShardLargest():
                axes += part.axes
    return axes


def _axes_of_spec(spec: Iterable[Any]) -> list[str]:
    return [axis for entry in spec for axis in axes_of(entry)]
