"""The conventional logical names, and checks of the options of ready strategies."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, did_you_mean, raise_all
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


Axes = str | tuple[str, ...] | None

PARAMS = (
    "vocab",
    "embed",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "norm",
    "experts",
    "expert_mlp",
)
ACTIVATIONS = (
    "batch",
    "length",
    "residual_length",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "experts",
    "expert_mlp",
    "choices",
)
CONVENTIONAL = frozenset((*PARAMS, *ACTIVATIONS))
"""Logical axes that the ready strategies list, whether or not a model has them."""


def params(split: Mapping[str, Axes]) -> AxisRules:
    """Rules for parameters: the given names are split, the other conventional ones are not."""
    return AxisRules({**dict.fromkeys(PARAMS), **split})


def activations(split: Mapping[str, Axes]) -> AxisRules:
    """Rules for activations: the given names are split, the other conventional ones are not."""
    return AxisRules({**dict.fromkeys(ACTIVATIONS), **split})


def check_strategy(strategy: str, axis: object, problems: Iterable[Problem] = ()) -> None:
    """Refuses a mesh axis that is not a name, and other problems of the declaration of a strategy.

    Raises StepError with all of them, and with the name of the function that makes the strategy.
    """
    problems = list(problems)
    if not isinstance(axis, str) or not axis:
        fix = f'strategies.{strategy}("{strategy}"), any name of the MeshSpec'
        why = "is not the name of a mesh axis"
        problems.insert(0, Problem(f"axis={axis!r}", why, fix))
    raise_all(StepError, f"strategies.{strategy}(...) is declared wrongly.", problems)


def choice_problems(**options: tuple[object, Iterable[str]]) -> list[Problem]:
    """Returns a problem for each option `name=(value, choices)` that is none of its choices.

    >>> choice_problems(attention=("rings", ("ring", "all_to_all")))[0].fix
    "attention='ring'"
    """
    problems = []
    for name, (value, choices) in options.items():
        known = tuple(choices)
        if value not in known:
            hint = did_you_mean(str(value), known)
            close = next((choice for choice in known if repr(choice) in hint), known[0])
            why, fix = f"known: {', '.join(map(repr, known))}.{hint}", f"{name}={close!r}"
            problems.append(Problem(f"{name}={value!r}", why, fix))
    return problems
