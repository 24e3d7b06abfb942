"""Finds what `mode="shard_map"` does not support in a spec or a model."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
from jax.extend import core

from ..._core.errors import Problem, StepError, did_you_mean, raise_all
from ..._core.tracing import equations
from ..._core.tree import Leaf, list_leaves
from ...nn._constrain import constrain_p
from ...nn._manual_axis_rules import Axes, Dims, ManualAxisRules, Names, ShardMapLoss, use_param_p
from ...parallel import known_kinds
from ...rules import axes_of, format_mesh
from .._bound_spec import BoundSpec
from .._layout import StepLayout
from ._buckets import ParamPlan


@dataclasses.dataclass(frozen=True)
class MarkedAxes:
    """The logical axes that a model passes to `use_param` and `constrain`.

    Attributes:
      weights: axes of each weight that it passes to `use_param`.
      into: axes that it passes as `into=`.
      activations: every axis of an activation.
      stated: every axis that it passes as `source=`, `into=` or `partial=`.
    """

    weights: frozenset[Names]
    into: frozenset[str]
    activations: tuple[str, ...]
    stated: tuple[str, ...]

    @classmethod
    def of(cls, jaxpr: core.Jaxpr) -> "MarkedAxes":
        """Reads the marked axes of a traced loss."""
        eqns = list(equations(jaxpr))
        constraints = [eqn.params for eqn in eqns if eqn.primitive is constrain_p]
        named = (name for params in constraints for name in params["names"] if name)
        return cls(
            weights=frozenset(e.params["names"] for e in eqns if e.primitive is use_param_p),
            into=frozenset(name for params in constraints for name in params["into"]),
            activations=tuple(dict.fromkeys(named)),
            stated=tuple(dict.fromkeys(n for p in constraints for n in (*p["into"], *p["also"]))),
        )


def check_supported(bound: BoundSpec, layout: StepLayout) -> None:
    """Checks a spec before tracing.

    Raises:
      StepError: with every problem.
    """
    whole_loss = not isinstance(bound.spec.loss_fn, ShardMapLoss)
    batch_problems = _batch_problems(layout) if whole_loss else ()
    problems = [*_kind_problems(bound), *batch_problems]
    raise_problems(bound, problems)


def raise_problems(bound: BoundSpec, problems: list[Problem]) -> None:
    """Raises all problems as one `StepError`."""
    mesh = format_mesh(bound.mesh.shape)
    raise_all(StepError, f'mode="shard_map" does not support this step on mesh {mesh}.', problems)


def leaf_problems(
    leaf: Leaf,
    stored: Dims,
    storage: Dims,
    axis_rules: ManualAxisRules,
    marked: MarkedAxes,
    row_axes: Axes,
) -> Iterator[Problem]:
    """Problems of one parameter.

    Args:
      leaf: the parameter.
      stored: mesh axes per dim that split it.
      storage: those that split it in storage but not in its products.
      axis_rules: logical axes → mesh axes in products.
      marked: the axes that the model marks.
      row_axes: mesh axes that split the rows.
    """
    names, subject = leaf.axes or (None,) * len(stored), str(leaf.within("params"))
    for dim, (name, axes, storage_axes) in enumerate(zip(names, stored, storage, strict=True)):
        used = axis_rules.axes(name)
        if used and axes[: len(used)] != used:
            why = f"dim {dim} ({name!r}) is stored over {_quote_all(axes)}, computed over "
            fix = f"strategy.with_names(params={{{name!r}: {_axes_code(used)}}})"
            yield Problem(subject, why + _quote_all(used), fix)
        elif used and name not in marked.into:
            why = f"dim {dim} ({name!r}) is split over {_quote_all(used)}, and the model never "
            why += f"marks what goes into products over {name!r}"
            fix = f'h = sk.nn.constrain(h, ..., into=({name!r},)); mode="auto" needs no marks'
            yield Problem(subject, why, fix)
        elif other := [axis for axis in storage_axes if axis not in row_axes]:
            why = f"dim {dim} is split over {_quote_all(other)}, which splits neither rows nor "
            fix = "sk.ShardMapLoss(local, reference), whose local loss sees the shards; or names, "
            yield Problem(subject, why + "products", fix + "and activations=sk.AxisRules({...})")


def _kind_problems(bound: BoundSpec) -> Iterator[Problem]:
    supported = dict.fromkeys(kind.name for kind in known_kinds() if kind.in_shard_map)
    for kind in bound.spec.strategy.kinds:
        if not kind.in_shard_map:
            why = f"over mesh axis {kind.axis!r} is left to the partitioner; supported here: "
            why += ", ".join(supported)
            yield Problem(f"{kind} parallelism", why, 'mode="auto"')
    for name, override in bound.spec.strategy.overrides:
        if name != "use_param" and bound.mesh.shape.get(override.axis, 1) > 1:
            why = f"{override} maps over {override.axis!r} itself"
            yield Problem(f"region {name!r}", why, 'mode="auto"')
    if bound.spec.stateful and bound.spec.strategy.compression:
        why = "keeps residuals beside the model state of a loss that has one"
        yield Problem("compression", why, "a strategy without compression")
    if bound.spec.stateful and bound.spec.accumulate.micro_batches > 1:
        why = "has mutable state, which every micro-batch would have to pass on"
        yield Problem("loss_fn", why, 'mode="auto", or accumulate=1')


def _batch_problems(layout: StepLayout) -> Iterator[Problem]:
    """An ordinary loss sees whole rows; only an `sk.ShardMapLoss` can see shards of them."""
    for leaf, sharding in zip(
        list_leaves(layout.batch), jax.tree.leaves(layout.batch_shardings), strict=True
    ):
        split = [axis for entry in tuple(sharding.spec)[1:] for axis in axes_of(entry)]
        if split:
            why = f"is split over {_quote_all(split)} beyond its rows"
            fix = f"batch=P({_axes_code(layout.row_axes)}), or sk.ShardMapLoss(local, reference)"
            yield Problem(str(leaf.within("batch")), why, fix)


def name_problems(axis_rules: ManualAxisRules, marked: MarkedAxes) -> Iterator[Problem]:
    """A misspelt name would silently drop a collective."""
    known = [name for name, _ in axis_rules.axes_by_name]
    for name in marked.stated:
        if known and name not in known:
            why = f"activations do not list logical axis {name!r}.{did_you_mean(name, known)}"
            yield Problem("constrain(source=, into=, partial=)", why, "a logical axis of the model")


def head_problems(axis_rules: ManualAxisRules, marked: MarkedAxes) -> Iterator[Problem]:
    """A device has the keys of its query heads only if both are split over the same axes."""
    heads, keys = axis_rules.axes("heads"), axis_rules.axes("kv_heads")
    if {"heads", "kv_heads"} <= set(marked.activations) and heads != keys:
        why = f"heads are split over {_quote_all(heads)}, kv_heads over {_quote_all(keys)}"
        fix = 'mode="auto" for fewer groups than devices; or strategies.tensor(kv_heads="split") '
        yield Problem("activations", why, fix + "on an axis whose size divides kv_heads")


def compression_problems(
    bound: BoundSpec, parameters: Iterable[ParamPlan], row_axes: Axes
) -> Iterator[Problem]:
    """Only gradients that are all-reduced over an axis can be compressed over it."""
    compression = bound.spec.strategy.compression
    if compression and not all(compression.axis in param.summed for param in parameters):
        axis = compression.axis
        why = f"gradients are not summed over {axis!r}, they are scattered over it or equal"
        yield Problem(
            "compression", why, f"an axis of the rows ({_quote_all(row_axes)}) that splits them"
        )


def _quote_all(axes: Iterable[str]) -> str:
    return ", ".join(map(repr, axes)) or "nothing"


def _axes_code(axes: Axes) -> str:
    return repr(axes if len(axes) != 1 else axes[0])
