"""Rules of a strategy that did nothing in one step: dead entries, and shadowed ones."""

import dataclasses
from collections.abc import Iterator, Sequence

from .._core.tree import Leaf, list_leaves
from ..parallel import CONVENTIONAL
from ..rules import AxisRules, DeadEntry, Rule, find_dead_entries, list_rules, place_leaf
from ._bound_spec import BoundSpec
from ._layout import Layout


def idle_rules(bound: BoundSpec, layout: Layout, constrained: Sequence[Leaf]) -> tuple[str, ...]:
    """Says which entries of a strategy's rules decide nothing.

    Not told are logical axes that ready strategies list for any model, and a last `**`.

    Args:
      bound: the spec and its mesh.
      layout: abstract state and batch.
      constrained: what the model constrains, with its logical axes.
    """
    strategy, state = bound.spec.strategy, layout.state
    asked: list[tuple[str, object, Sequence[Leaf]]] = [
        ("params", strategy.params, list_leaves(state.params, layout.axes)),
        ("opt_state", strategy.opt_state, list_leaves(state.opt_state)),
        ("model_state", strategy.model_state, list_leaves(state.model_state)),
        ("batch", strategy.batch, list_leaves(layout.batch)),
        ("activations", strategy.activations, [_plain(leaf) for leaf in constrained]),
    ]
    sizes = dict(bound.mesh.shape)
    return tuple(
        f"{field}: {one}"
        for field, rule, of in asked
        if isinstance(rule, Rule) and of
        for one in find_dead_entries(
            rule, [place_leaf(rule, leaf, sizes) for leaf in of if leaf.shape]
        )
        if not _meant(one, rule)
    )


def _plain(leaf: Leaf) -> Leaf:
    """A constraint without the dims that a step or a `jax.vmap` added to it."""
    names = tuple(None if n and n.startswith("(") else n for n in leaf.axes or ())
    return dataclasses.replace(leaf, axes=names)


def _meant(one: DeadEntry, rule: Rule) -> bool:
    """Whether an entry may well do nothing."""
    if one.entry.key == "**":
        return True
    if one.entry.key not in CONVENTIONAL:
        return False
    return not one.matched or one.entry.key not in set(_split(rule))


def _split(rule: Rule) -> Iterator[str]:
    """Logical axes that tables in a rule map to a mesh axis."""
    for one in list_rules(rule):
        if isinstance(one, AxisRules):
            yield from (name for name, axes in one.table if axes)
