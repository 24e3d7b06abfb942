"""Finds rules of a strategy that decide nothing in a step: unused and shadowed entries."""

import dataclasses
from collections.abc import Iterator, Sequence

from .._core.tree import Leaf, list_leaves
from ..parallel import CONVENTIONAL
from ..rules import (
    AxisRules,
    DeadEntry,
    Rule,
    find_dead_entries,
    list_ruled,
    list_rules,
    place_leaf,
)
from ._bound_spec import BoundSpec
from ._layout import StepLayout


def find_unused_rules(
    bound: BoundSpec, layout: StepLayout, constrained: Sequence[Leaf]
) -> tuple[str, ...]:
    """Lists the entries of a strategy's rules that decide nothing, as text.

    It omits logical axes that `sk.strategies` list for any model, and a last `**`. Leaves in
    `constrained` are the model's constraints, with their logical axes.
    """
    strategy, state = bound.spec.strategy, layout.state
    params = list_leaves(state.params, layout.axes)
    uses: list[tuple[str, object, Sequence[Leaf]]] = [
        ("params", strategy.params, list_ruled(params, bound.spec.follows)),
        ("opt_state", strategy.opt_state, list_leaves(state.opt_state)),
        ("model_state", strategy.model_state, list_leaves(state.model_state)),
        ("batch", strategy.batch, list_leaves(layout.batch)),
        ("activations", strategy.activations, [_drop_mapped_dims(leaf) for leaf in constrained]),
    ]
    sizes = dict(bound.mesh.shape)
    return tuple(
        f"{field}: {entry}"
        for field, rule, of in uses
        if isinstance(rule, Rule) and of
        for entry in find_dead_entries(
            rule, [place_leaf(rule, leaf, sizes) for leaf in of if leaf.shape]
        )
        if not _is_expected(entry, rule)
    )


def _drop_mapped_dims(leaf: Leaf) -> Leaf:
    """A constraint without the names of dims that a `jax.vmap` added."""
    names = tuple(None if n and n.startswith("(") else n for n in leaf.axes or ())
    return dataclasses.replace(leaf, axes=names)


def _is_expected(unused: DeadEntry, rule: Rule) -> bool:
    """Whether an unused entry needs no report."""
    name = unused.entry.key
    if name == "**":
        return True
    if name not in CONVENTIONAL:
        return False
    return not unused.matched or name not in set(_mapped_axes(rule))


def _mapped_axes(rule: Rule) -> Iterator[str]:
    """Logical axes that tables in a rule map to a mesh axis."""
    for part in list_rules(rule):
        if isinstance(part, AxisRules):
            yield from (name for name, axes in part.table if axes)
