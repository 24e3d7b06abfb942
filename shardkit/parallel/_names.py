"""The conventional logical names, and what the ready strategies start from: nothing is split."""

from collections.abc import Mapping

from .._core.errors import Problem, StepError, raise_all
from ..rules import AxisRules

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
    """Rules for parameters: the given names split, the other conventional ones whole."""
    return AxisRules({**dict.fromkeys(PARAMS), **split})


def activations(split: Mapping[str, Axes]) -> AxisRules:
    """The same for activations."""
    return AxisRules({**dict.fromkeys(ACTIVATIONS), **split})


def check_axis(strategy: str, axis: object) -> None:
    """Refuses what cannot name a mesh axis, where the strategy is declared.

    Args:
      strategy: name of the function that makes it.
      axis: what it was given.

    Raises:
      StepError: naming the strategy.
    """
    if not isinstance(axis, str) or not axis:
        fix = f'strategies.{strategy}("{strategy}"), any name of the MeshSpec'
        problem = Problem(f"{strategy}(axis={axis!r})", "is no name of a mesh axis", fix)
        raise_all(StepError, "A strategy is declared wrongly.", [problem])
