"""What a model marked of its dims, and what explicit collectives cannot carry out."""

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
from .._layout import Layout
from ._buckets import Parameter


@dataclasses.dataclass(frozen=True)
class Marks:
    """What a model said of its dims.

    Attributes:
      weights: names of the weights that it marked where it uses them.
      into: logical axes of the products that marked activations go into.
      activations: every logical axis of an activation.
      stated: every logical axis that `source=`, `into=` and `partial=` name.
    """

    weights: frozenset[Names]
    into: frozenset[str]
    activations: tuple[str, ...]
    stated: tuple[str, ...]

    @classmethod
    def of(cls, jaxpr: core.Jaxpr) -> "Marks":
        """Reads the marks of a traced loss."""
        found = [(eqn.primitive, eqn.params) for eqn in equations(jaxpr)]
        constraints = [params for kind, params in found if kind is constrain_p]
        named = (name for params in constraints for name in params["names"] if name)
        return cls(
            frozenset(params["names"] for kind, params in found if kind is use_param_p),
            frozenset(name for params in constraints for name in params["into"]),
            tuple(dict.fromkeys(named)),
            tuple(dict.fromkeys(n for p in constraints for n in (*p["into"], *p["also"]))),
        )


def check_declared(bound: BoundSpec, layout: Layout) -> None:
    """Refuses what explicit collectives cannot carry out, as far as no tracing is needed.

    Raises:
      StepError: with everything that is found.
    """
    own = isinstance(bound.spec.loss_fn, ShardMapLoss)
    problems = [*_kind_problems(bound), *_batch_problems(layout, own)]
    refuse(bound, problems)


def refuse(bound: BoundSpec, problems: list[Problem]) -> None:
    where = format_mesh(bound.mesh.shape)
    raise_all(StepError, f'mode="shard_map" cannot carry this out on mesh {where}.', problems)


def leaf_problems(
    leaf: Leaf, stored: Dims, surplus: Dims, meant: ManualAxisRules, marks: Marks, rows: Axes
) -> Iterator[Problem]:
    names = leaf.axes or (None,) * len(stored)
    for dim, (name, axes, more) in enumerate(zip(names, stored, surplus, strict=True)):
        used, subject = meant.axes(name), str(leaf.within("params"))
        if used and axes[: len(used)] != used:
            why = f"dim {dim} ({name!r}) is stored over {_listed(axes)}, computed over "
            fix = f"strategy.with_names(params={{{name!r}: {_code(used)}}})"
            yield Problem(subject, why + _listed(used), fix)
        elif used and name not in marks.into:
            why = f"dim {dim} ({name!r}) is split over {_listed(used)}, and the model never marks "
            why += f"what goes into products over {name!r}"
            fix = f'h = sk.nn.constrain(h, ..., into=({name!r},)); mode="auto" needs no marks'
            yield Problem(subject, why, fix)
        elif lost := [axis for axis in more if axis not in rows]:
            why = f"dim {dim} is split over {_listed(lost)}, which splits neither rows nor products"
            fix = "sk.ShardMapLoss(loss, plain), whose loss sees the shards; or names, and activations="
            yield Problem(subject, why, fix + "sk.AxisRules({...})")


def _kind_problems(bound: BoundSpec) -> Iterator[Problem]:
    carried = dict.fromkeys(kind.name for kind in known_kinds() if kind.in_shard_map)
    for kind in bound.spec.strategy.kinds:
        if not kind.in_shard_map:
            why = f"over mesh axis {kind.axis!r} is left to the partitioner; here: "
            why += ", ".join(carried)
            yield Problem(f"{kind} parallelism", why, 'mode="auto"')
    for name, override in bound.spec.strategy.overrides:
        if name != "use_param" and bound.mesh.shape.get(override.axis, 1) > 1:
            why = f"{override} maps over {override.axis!r} itself"
            yield Problem(f"region {name!r}", why, 'mode="auto"')
    if bound.spec.stateful:
        why = "carries mutable state, which would be that of one device's rows"
        yield Problem("loss_fn", why, 'mode="auto"')


def _batch_problems(layout: Layout, own: bool) -> Iterator[Problem]:
    """An ordinary loss sees whole rows; one of shards may be given parts of them."""
    for leaf, sharding in zip(
        list_leaves(layout.batch), jax.tree.leaves(layout.batch_shardings), strict=True
    ):
        split = [axis for entry in tuple(sharding.spec)[1:] for axis in axes_of(entry)]
        if split and not own:
            why = f"is split over {_listed(split)} beyond its rows"
            fix = f"batch=P({_code(layout.row_axes)}), or sk.ShardMapLoss(loss, plain)"
            yield Problem(str(leaf.within("batch")), why, fix)


def name_problems(meant: ManualAxisRules, marks: Marks) -> Iterator[Problem]:
    """A misspelt mark would be a collective that is missing."""
    known = [name for name, _ in meant.axes_by_name]
    for name in marks.stated:
        if known and name not in known:
            why = f"activations do not list logical axis {name!r}.{did_you_mean(name, known)}"
            yield Problem("constrain(source=, into=, partial=)", why, "a logical axis of the model")


def head_problems(meant: ManualAxisRules, marks: Marks) -> Iterator[Problem]:
    """Queries find the keys of their group only where both are split alike."""
    heads, keys = meant.axes("heads"), meant.axes("kv_heads")
    if {"heads", "kv_heads"} <= set(marks.activations) and heads != keys:
        why = f"heads are split over {_listed(heads)}, kv_heads over {_listed(keys)}"
        fix = 'mode="auto" for fewer groups than devices; or strategies.tensor(kv_heads="split") '
        yield Problem("activations", why, fix + "on an axis whose size divides kv_heads")


def compression_problems(
    bound: BoundSpec, parameters: Iterable[Parameter], rows: Axes
) -> Iterator[Problem]:
    """Gradients are compressed where they are summed whole."""
    how = bound.spec.strategy.compression
    if how and not all(how.axis in one.summed for one in parameters):
        why = f"gradients are not summed over {how.axis!r}, they are scattered over it or equal"
        yield Problem("compression", why, f"an axis of the rows ({_listed(rows)}) that splits them")


def _listed(axes: Iterable[str]) -> str:
    return ", ".join(map(repr, axes)) or "nothing"


def _code(axes: Axes) -> str:
    return repr(axes if len(axes) != 1 else axes[0])
