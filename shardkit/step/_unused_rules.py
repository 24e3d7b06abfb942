"""Rules of a strategy that did nothing in one step: dead entries, and shadowed ones."""

import dataclasses
from collections.abc import Iterator, Sequence

from .._core.tree import Leaf, leaves
from ..parallel import CONVENTIONAL
from ..rules import AxisRules, Dead, Rule, dead, flatten, place
from ._bound_spec import BoundSpec
from ._layout import StepLayout


def find_unused_rules(
    bound: BoundSpec, layout: StepLayout, constrained: Sequence[Leaf]
) -> tuple[str, ...]:
    """Says which entries of a strategy's rules decide nothing.

    Not told are logical axes that ready strategies list for any model, and a last `**`.

    Args:
      bound: the spec and its mesh.
      layout: abstract state and batch.
      constrained: what the model constrains, with its logical axes.
    """
    strategy, state = bound.spec.strategy, layout.state
    asked: list[tuple[str, object, Sequence[Leaf]]] = [
        ("params", strategy.params, leaves(state.params, layout.axes)),
        ("opt_state", strategy.opt_state, leaves(state.opt_state)),
        ("model_state", strategy.model_state, leaves(state.model_state)),
        ("batch", strategy.batch, leaves(layout.batch)),
        ("activations", strategy.activations, [_drop_mapped_dims(leaf) for leaf in constrained]),
    ]
    sizes = dict(bound.mesh.shape)
    return tuple(
        f"{field}: {one}"
        for field, rule, of in asked
        if isinstance(rule, Rule) and of
        for one in dead(rule, [place(rule, leaf, sizes) for leaf in of if leaf.shape])
        if not _is_expected(one, rule)
    )


def _drop_mapped_dims(leaf: Leaf) -> Leaf:
    """A constraint without the dims that a step or a `jax.vmap` added to it."""
    names = tuple(None if n and n.startswith("(") else n for n in leaf.axes or ())
    return dataclasses.replace(leaf, axes=names)


def _is_expected(one: Dead, rule: Rule) -> bool:
    """Whether an entry may well do nothing."""
    if one.entry.key == "**":
        return True
    if one.entry.key not in CONVENTIONAL:
        return False
    return not one.matched or one.entry.key not in set(_mapped_axes(rule))


def _mapped_axes(rule: Rule) -> Iterator[str]:
    """Logical axes that tables in a rule map to a mesh axis."""
    for one in flatten(rule):
        if isinstance(one, AxisRules):
            yield from (name for name, axes in one.table if axes)
