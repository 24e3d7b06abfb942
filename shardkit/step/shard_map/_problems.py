"""Finds what `mode="shard_map"` does not support in a spec or a model."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from ..._core.equations import source_of_equation
from ..._core.errors import Problem, StepError, did_you_mean, first_line, raise_all
from ..._core.source import find_user_line
from ..._core.tracing import equations
from ..._core.tree import Leaf, list_leaves
from ...nn._constrain import constrain_p
from ...nn._manual_axis_rules import Axes, Dims, ManualAxisRules, ShardMapLoss
from ...parallel import known_kinds
from ...rules import axes_of, format_mesh
from .._bound_spec import BoundSpec
from .._layout import StepLayout
from .._own_constraints import describe_constraint, own_constraints
from ._buckets import ParamPlan


@dataclasses.dataclass(frozen=True)
class MarkedAxes:
    """The logical axes that a model passes to `constrain`."""

    into: frozenset[str]  # axes that it passes as `into=`
    activations: tuple[str, ...]  # every axis of an activation
    stated: tuple[str, ...]  # every axis that it passes as `source=`, `into=` or `partial=`

    @classmethod
    def of(cls, jaxpr: core.Jaxpr) -> "MarkedAxes":
        """Reads the marked axes of a traced loss."""
        eqns = list(equations(jaxpr))
        constraints = [eqn.params for eqn in eqns if eqn.primitive is constrain_p]
        named = (name for params in constraints for name in params["names"] if name)
        return cls(
            into=frozenset(name for params in constraints for name in params["into"]),
            activations=tuple(dict.fromkeys(named)),
            stated=tuple(dict.fromkeys(n for p in constraints for n in (*p["into"], *p["also"]))),
        )


def check_supported(bound: BoundSpec, layout: StepLayout) -> None:
    """Raises StepError with every problem that a spec has before tracing."""
    whole_loss = not isinstance(bound.spec.loss_fn, ShardMapLoss)
    batch_problems = _batch_problems(layout) if whole_loss else ()
    raise_problems(bound, [*_kind_problems(bound), *batch_problems])


def raise_problems(bound: BoundSpec, problems: list[Problem]) -> None:
    """Raises all problems as one `StepError`."""
    mesh = format_mesh(bound.mesh.shape)
    raise_all(StepError, f'mode="shard_map" does not support this step on mesh {mesh}.', problems)


@contextlib.contextmanager
def explain_loop_types() -> Iterator[None]:
    """Turns JAX's error about a loop that starts from a constant into a `StepError`, with its line.

    On shards `jnp.zeros(...)` is the same on all devices, and what a loop adds to it is not; JAX
    wants both of one type.
    """
    try:
        yield
    except TypeError as error:
        if "manual axis types do not match" not in str(error):
            raise
        frames = reversed(traceback.extract_tb(error.__traceback__))
        where = find_user_line((frame.filename, frame.lineno or 0) for frame in frames)
        what = first_line(error).split(" must ")[0]
        why = f"{what} differ: one is a constant, the other depends on a device's rows"
        fix = 'jnp.zeros_like(x[0]) of an array of the batch, not jnp.zeros(...); or mode="auto"'
        subject = f"loss_fn at {where}" if where else "loss_fn"
        headline = 'mode="shard_map" cannot trace the loss on shards.'
        raise StepError.of(headline, subject, why, fix) from error


def leaf_problems(
    leaf: Leaf,
    stored: Dims,
    storage: Dims,
    axis_rules: ManualAxisRules,
    marked: MarkedAxes,
    row_axes: Axes,
) -> Iterator[Problem]:
    """Problems of one parameter; products are not split over `storage`, a part of its axes."""
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


def _batch_problems(layout: StepLayout) -> Iterator[Problem]:
    """An ordinary loss sees whole rows; only an `sk.ShardMapLoss` can see shards of them."""
    columns = list_leaves(layout.batch), jax.tree.leaves(layout.batch_shardings), layout.row_dims
    for leaf, sharding, row_dim in zip(*columns, strict=True):
        axes = [axes_of(entry) for entry in sharding.spec]
        axes += [()] * (len(leaf.shape) - len(axes))
        rows = axes.pop(row_dim) if row_dim is not None else layout.row_axes
        if split := [axis for names in axes for axis in names]:
            why = f"is split over {_quote_all(split)} beyond its rows"
            fix = f"batch=P({_axes_code(layout.row_axes)})"
            fix = "sk.REPLICATED for a leaf without rows" if row_dim is None else fix
            fix += ", or sk.ShardMapLoss(local, reference)"
            yield Problem(str(leaf.within("batch")), why, fix)
        elif rows != layout.row_axes:
            why = f"has its rows over {_quote_all(rows)}, others over {_quote_all(layout.row_axes)}"
            yield Problem(str(leaf.within("batch")), why, "one split of the rows for every leaf")


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
    bound: BoundSpec, leaves: Sequence[Leaf], parameters: Sequence[ParamPlan], row_axes: Axes
) -> Iterator[Problem]:
    """Only real gradients that are all-reduced over an axis can be compressed over it."""
    compression = bound.spec.strategy.compression
    for leaf in leaves if compression else ():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            why = "is complex, and gradients are rounded to 8 bits as real numbers"
            fix = "a real array [..., 2] with both parts, or no GradientCompression"
            yield Problem(str(leaf.within("params")), why, fix)
    if compression and not all(compression.axis in param.summed for param in parameters):
        axis = compression.axis
        why = f"gradients are not summed over {axis!r}, they are scattered over it or equal"
        fix = f"an axis of the rows ({_quote_all(row_axes)}) that splits them"
        yield Problem("compression", why, fix)


def own_sharding_problems(jaxpr: core.Jaxpr) -> Iterator[Problem]:
    """On shards every mesh axis is manual, which voids what a model says of sharding itself."""
    for place, spec in dict.fromkeys(map(describe_constraint, own_constraints(jaxpr))):
        why = f"{spec} means nothing where the loss sees one device's shard"
        yield Problem(place, why, 'mode="auto"; or sk.nn.constrain(x, ...), which works in both')
    for equation in equations(jaxpr):
        if equation.primitive.name == "shard_map":
            source = source_of_equation(equation)
            place = f" at {source.file}:{source.line}" if source else ""
            why = "would map one device's shard again"
            fix = 'mode="auto"; or sk.ShardMapLoss(local, reference)'
            yield Problem(f"shard_map{place}", why, fix)


def _quote_all(axes: Iterable[str]) -> str:
    return ", ".join(map(repr, axes)) or "nothing"


def _axes_code(axes: Axes) -> str:
    return repr(axes if len(axes) != 1 else axes[0])
