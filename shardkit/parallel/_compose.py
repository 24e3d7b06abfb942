"""Checks that combined strategies fit each other and the mesh.

Each strategy checks its own options; checks that need several of them, or the mesh, are here.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

from jax.sharding import PartitionSpec

from .. import nn
from .._core.errors import Problem, ShardingError, StepError, count, did_you_mean, raise_all
from ..nn._overridable import Override
from ..rules import Indivisible, UnlistedAxis, axes_of, format_mesh, shard_count
from ._strategy import Strategy
from .pipeline._stage_layout import balanced_sizes


def check_composition(strategy: Strategy, sizes: Mapping[str, int]) -> None:
    """Raises one ShardingError for strategies that do not fit each other or the mesh's sizes.

    That is two strategies for one axis, an axis that the mesh lacks, or state split by ZeRO over an
    axis that splits no rows.
    """
    problems = [
        *_shared_axes(strategy),
        *_absent_axes(strategy, sizes),
        *_zero_without_rows(strategy, sizes),
    ]
    headline = f"The strategies do not fit together on mesh {format_mesh(sizes)}."
    raise_all(ShardingError, headline, problems)


def check_axes_used(strategy: Strategy, sizes: Mapping[str, int], used: Collection[str]) -> None:
    """Raises ShardingError with each mesh axis that no strategy uses, whose devices repeat work.

    `used` are the axes that split some leaf of state or batch. For a strategy without `kinds`, such
    an axis is only a finding of the report.
    """
    named = {kind.axis for kind in strategy.kinds} | set(used)
    named |= {override.axis for _, override in strategy.overrides}
    if strategy.activations:
        named |= {axis for _, axes in strategy.activations.table for axis in axes}
    problems = [
        Problem(
            f"mesh axis {axis!r}",
            f"no strategy uses it: its {size} devices would repeat the same work "
            f"(strategies are on {', '.join(repr(kind.axis) for kind in strategy.kinds)})",
            f"| strategies.data({axis!r}), leave {axis!r} out of the MeshSpec, or, where the loss "
            f"uses it itself, | strategies.own({axis!r})",
        )
        for axis, size in sizes.items()
        if strategy.kinds and size > 1 and axis not in named
    ]
    headline = f"{count(len(problems), 'axis')} of mesh {format_mesh(sizes)} would be idle."
    raise_all(ShardingError, headline, problems)


def check_overrides_called(strategy: Strategy, unreached: Mapping[str, Override]) -> None:
    """Raises StepError with each strategy that overrides a part which the model never calls.

    `unreached` has the overrides of the parts that a trace of the model lacks, by name.
    """
    problems = []
    for name, override in unreached.items():
        kinds = (kind for kind in strategy.kinds if kind.axis == override.axis)
        user = next((f"`strategies.{kind.name}()`" for kind in kinds), str(override))
        call = f"sk.nn.{name}" if name in dir(nn) else f"sk.nn.overridable({name!r}, ...)"
        why = f"needs `{call}`, but the model never calls it"
        problems.append(Problem(user, why, call if "(" in call else f"{call}(...) in the model"))
    raise_all(StepError, "The model lacks a part that the strategy overrides.", problems)


def suggest_options(problems: Sequence[Problem], sizes: Mapping[str, int]) -> list[Problem]:
    """Adds to problems of leaves the options of ready strategies that fix them.

    An `Indivisible` names the logical axis of its dim.
    """

    def suggest(problem: Problem) -> Problem:
        option = _find_option(problem, sizes) if isinstance(problem, Indivisible) else None
        if option is None:
            return problem
        return dataclasses.replace(problem, fix=f"{option}; or {problem.fix}")

    return [suggest(problem) for problem in problems]


def suggest_renames(problems: Sequence[Problem], strategy: Strategy) -> list[Problem]:
    """Replaces the fix of a logical axis that the tables of a ready strategy do not list.

    An `UnlistedAxis` has the name. A strategy without kinds has tables of the user's own.
    """
    known = ", ".join(strategy.logical_axes)

    def suggest(problem: Problem) -> Problem:
        if not strategy.kinds or not isinstance(problem, UnlistedAxis):
            return problem
        name = problem.logical
        fix = f"strategy.with_names(params={{{name!r}: None}})"
        if name not in strategy.logical_axes:  # or of activations alone
            near = did_you_mean(name, strategy.logical_axes)
            old = near.split("'")[1] if near else "mlp"
            rename = f"strategy.rename({{{old!r}: {name!r}}})"
            fix = f"{rename}, if the dim is what the strategy calls {old!r}; or {fix}"
        return dataclasses.replace(problem, fix=f"{fix}; it lists {known}")

    return [suggest(problem) for problem in problems]


def _find_option(problem: Indivisible, sizes: Mapping[str, int]) -> str | None:
    if problem.logical == "kv_heads":
        call = 'strategies.tensor(kv_heads="replicate")'
        return f'{call} in mode="auto" for fewer groups than devices'
    if problem.logical == "vocab":
        added = -problem.size % shard_count(problem.axes, sizes)
        return f"{added} more rows that no token has (vocab_padding={added} of DecoderConfig)"
    if problem.logical == "layers":
        stages = balanced_sizes(problem.size, shard_count(problem.axes, sizes))
        call = f"strategies.pipeline(..., layers_per_stage={stages})"
        unsplit = '.with_names(params={"layers": None})'
        return f"{call}{unsplit}, which stores all layers on every stage"
    return None


def _shared_axes(strategy: Strategy) -> list[Problem]:
    problems = []
    for first, second in itertools.combinations(strategy.kinds, 2):
        shared = first.shares_axis(second) or second.shares_axis(first)
        if first.axis == second.axis and not shared:
            why = f"is taken by {first} and by {second}; each needs an axis of its own"
            fix = (
                f"strategies.{second.name}(axis) with another axis of the mesh, or only one of them"
            )
            problems.append(Problem(f"mesh axis {first.axis!r}", why, fix))
    return problems


def _absent_axes(strategy: Strategy, sizes: Mapping[str, int]) -> list[Problem]:
    return [
        Problem(
            f"mesh axis {kind.axis!r}",
            f"is used by {kind}; mesh has {format_mesh(sizes)[1:-1]}."
            + did_you_mean(kind.axis, sizes),
            f"MeshSpec(..., {kind.axis}=2), {kind.axis}=1 to split nothing over it, "
            f"or strategies.{kind.name}(axis) with one of " + ", ".join(map(repr, sizes)),
        )
        for kind in strategy.kinds
        if kind.axis not in sizes
    ]


def _zero_without_rows(strategy: Strategy, sizes: Mapping[str, int]) -> list[Problem]:
    """Over an axis that splits no rows, every device has the whole gradient already."""
    zero, batch = strategy.zero, strategy.batch
    if zero is None or zero.axis not in sizes or not isinstance(batch, PartitionSpec):
        return []
    rows = axes_of(batch[0]) if len(batch) else ()
    if zero.axis in rows:
        return []
    over = f"rows are over {', '.join(map(repr, rows))}" if rows else "no rows are split"
    why = f"splits the update over {zero.axis!r}, which splits no rows of the batch: {over}"
    fix = f"batch=P({tuple(dict.fromkeys((*rows, zero.axis)))!r})"
    return [Problem(f"zero({zero.axis!r})", why, fix)]
