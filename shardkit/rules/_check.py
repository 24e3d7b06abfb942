"""Checks of one spec for one leaf on one mesh, with the nearest legal sizes."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, did_you_mean
from .._core.tree import Leaf
from ._specs import (
    HasShape,
    axes_of,
    format_mesh,
    format_spec,
    mesh_sizes,
    shard_count,
    spec_from_axes,
)


@dataclasses.dataclass(frozen=True)
class Indivisible(Problem):
    """A dim that its mesh axes do not divide; problems of the same axes share one fix."""

    dim: int = 0
    size: int = 0
    axes: tuple[str, ...] = ()
    logical: str | None = None


def check_spec(
    leaf: Leaf,
    spec: PartitionSpec,
    mesh: Mapping[str, int] | HasShape,
    source: str,
    *,
    dims: Sequence[str] = (),
) -> list[Problem]:
    """Lists everything that keeps a leaf from having a spec.

    Args:
      leaf: the array; also an activation or a leaf of a batch.
      spec: the spec as declared.
      mesh: the mesh, or `{axis: size}`.
      source: the rule or field that the spec is from, as the error names it.
      dims: the source of each dim's entry, if they differ.

    Returns:
      One problem per failure: too many entries, `UNCONSTRAINED` or unreduced axes, an axis that
      the mesh lacks, an axis used twice, a dim that its axes do not divide.
    """
    sizes = mesh_sizes(mesh)
    subject, shown = str(leaf), format_spec(spec)
    if spec.unreduced or spec.reduced:
        why = f"{source} → {spec} has unreduced axes"
        return [Problem(subject, why, f"{shown}, without unreduced axes")]
    if any(entry is PartitionSpec.UNCONSTRAINED for entry in spec):
        why = f"{source} → {shown} leaves a dim unconstrained"
        return [Problem(subject, why, "an axis name splits the dim, None keeps it whole")]
    problems: list[Problem] = []
    entries = [axes_of(entry) for entry in spec]
    if len(entries) > len(leaf.shape):
        why = f"{source} → {shown} has {len(entries)} entries for {len(leaf.shape)} dims"
        entries = entries[: len(leaf.shape)]
        short = format_spec(spec_from_axes(entries))
        problems = [Problem(subject, why, f"at most one entry per dim, such as {short}")]
    problems += _find_unknown_axes(subject, f"{source} → {shown}", entries, sizes)
    problems += _find_repeated_axes(leaf, f"{source} → {shown}", entries, dims)
    for dim, axes in enumerate(entries):
        if set(axes) <= set(sizes) and leaf.shape[dim] % shard_count(axes, sizes):
            problems.append(
                _describe_indivisible(leaf, dim, entries, sizes, source=source, dims=dims)
            )
    return problems


def _find_unknown_axes(
    subject: str, origin: str, entries: list[tuple[str, ...]], mesh: Mapping[str, int]
) -> list[Problem]:
    used = dict.fromkeys(axis for axes in entries for axis in axes)
    return [
        Problem(
            subject,
            f"{origin} uses axis {axis!r}; mesh has {format_mesh(mesh)[1:-1]}."
            + did_you_mean(axis, mesh),
            f"one of {', '.join(map(repr, mesh))}, or add {axis!r} to the MeshSpec",
        )
        for axis in used
        if axis not in mesh
    ]


def _find_repeated_axes(
    leaf: Leaf, origin: str, entries: list[tuple[str, ...]], dims: Sequence[str]
) -> list[Problem]:
    dims_of: dict[str, list[int]] = collections.defaultdict(list)
    for dim, axes in enumerate(entries):
        for axis in axes:
            dims_of[axis].append(dim)
    problems = []
    for axis, repeated in dims_of.items():
        if len(repeated) == 1:
            continue
        why = f"{origin} uses axis {axis!r} twice, for dims {' and '.join(map(str, repeated))}"
        names = {repr((leaf.axes or ())[dim]) for dim in repeated} if dims else set()
        if len(names) > 1:
            fix = f"map {' or '.join(sorted(names))} to another mesh axis or None"
        else:
            fix = f"use each mesh axis once, such as {format_spec(_drop_repeats(entries))}"
        problems.append(Problem(str(leaf), why, fix))
    return problems


def _drop_repeats(entries: list[tuple[str, ...]]) -> PartitionSpec:
    """Keeps the first use of each mesh axis."""
    used: set[str] = set()
    dims: list[list[str]] = []
    for axes in entries:
        dims.append([axis for axis in dict.fromkeys(axes) if axis not in used])
        used.update(axes)
    return spec_from_axes(dims)


def _describe_indivisible(
    leaf: Leaf,
    dim: int,
    entries: list[tuple[str, ...]],
    mesh: Mapping[str, int],
    *,
    source: str,
    dims: Sequence[str],
) -> Indivisible:
    size, axes = leaf.shape[dim], entries[dim]
    origin = dims[dim] if dims else f"{source} → {format_spec(spec_from_axes(entries))}"
    why = f"{origin}: dim {dim} ({size}) is not divisible by {_format_total(axes, mesh)}"
    whole = spec_from_axes(() if at == dim else other for at, other in enumerate(entries))
    logical = (leaf.axes or ())[dim] if dims else None
    return Indivisible(
        subject=str(leaf),
        why=f"{why} ({_join_or(nearest_multiples(size, shard_count(axes, mesh)))} would be)",
        fix=f"{source} → {format_spec(whole)}",
        dim=dim,
        size=size,
        axes=axes,
        logical=logical,
    )


def share_fixes(problems: Sequence[Problem], mesh: Mapping[str, int]) -> list[Problem]:
    """Gives the dims that the same axes fail to divide one fix for all of them."""
    groups: dict[tuple[str, ...], list[Indivisible]] = collections.defaultdict(list)
    for problem in problems:
        if isinstance(problem, Indivisible):
            groups[problem.axes].append(problem)
    fixes = {axes: _format_shared_fix(axes, group, mesh) for axes, group in groups.items()}
    return [
        dataclasses.replace(p, fix=fixes[p.axes]) if isinstance(p, Indivisible) else p
        for p in problems
    ]


def _format_shared_fix(
    axes: tuple[str, ...], group: Sequence[Indivisible], mesh: Mapping[str, int]
) -> str:
    names = list(dict.fromkeys(repr(p.logical) for p in group if p.logical))
    fixes = [_suggest_sizes(axes, math.gcd(*(p.size for p in group)), mesh)]
    fixes += [f"map {' and '.join(names)} to None"] if names else []
    fixes += list(dict.fromkeys(p.fix for p in group if not p.logical))
    return "; or ".join(filter(None, fixes))


def _suggest_sizes(axes: tuple[str, ...], size: int, mesh: Mapping[str, int]) -> str:
    """Returns `MeshSpec(tensor=2), 4, 8 or 16`: sizes of one axis that divide `size`."""
    for axis in axes:
        others = shard_count((a for a in axes if a != axis), mesh)
        if size % others == 0:
            quotient = size // others
            legal = [n for n in range(2, quotient + 1) if quotient % n == 0] or [1]
            near = sorted(legal, key=lambda n: abs(math.log(n / mesh[axis])))[:4]
            first, *rest = sorted(near)
            return _join_or([f"MeshSpec({axis}={first})", *rest])
    return ""


def nearest_multiples(size: int, parts: int) -> list[int]:
    """Lists the multiples of `parts` just below and above `size`, without 0.

    >>> nearest_multiples(10, 4), nearest_multiples(3, 4)
    ([8, 12], [4])
    """
    below = size // parts * parts
    return [n for n in (below, below + parts) if n]


def check_batch(
    leaves: Iterable[Leaf], specs: Mapping[str, PartitionSpec], mesh: Mapping[str, int] | HasShape
) -> list[Problem]:
    """Lists each failure to split a global batch by the specs of its paths; dim 0 counts its rows.

    The mesh may be `{axis: size}`.
    """
    sizes = mesh_sizes(mesh)
    problems = [p for leaf in leaves for p in check_spec(leaf, specs[leaf.path], sizes, "batch")]
    return share_fixes([_rephrase_as_rows(p, sizes) for p in problems], sizes)


def _rephrase_as_rows(problem: Problem, mesh: Mapping[str, int]) -> Problem:
    """Rephrases an indivisible dim 0 as a number of rows."""
    if not isinstance(problem, Indivisible) or problem.dim:
        return problem
    shards = shard_count(problem.axes, mesh)
    why = f"global batch {problem.size} must be a multiple of {shards}"
    return Problem(
        problem.subject,
        f"{why} ({_format_product(problem.axes, mesh)} shard the batch dim)",
        f"a global batch of {_join_or(nearest_multiples(problem.size, shards))}",
    )


def _format_product(axes: tuple[str, ...], mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={mesh[axis]}" for axis in axes)


def _format_total(axes: tuple[str, ...], mesh: Mapping[str, int]) -> str:
    total = f" = {shard_count(axes, mesh)}" if len(axes) > 1 else ""
    return _format_product(axes, mesh) + total


def _join_or(options: Iterable[object]) -> str:
    *most, last = map(str, options)
    return f"{', '.join(most)} or {last}" if most else last
