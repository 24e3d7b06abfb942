"""Which parameters are adapted: the rules of `sk.lora` against the leaves that `init` returns."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import Problem, StepError, did_you_mean, raise_all
from .._core.own_sharding import on_any_mesh
from .._core.tree import Leaf, path_str
from .._core.types import Params
from ..nn._manual_axis_rules import ShardMapLoss
from ..rules import matches
from ._factors import AdaptedLeaf
from ._products import Products
from ._tracked import Tracked

Rank = int | tuple[int, str] | None
Alpha = float | Mapping[str, float | None] | None

_HEADLINE = "Low-rank adapters are declared wrongly."
# Logical axes that no product contracts.
_STACKED = ("layers", "experts")


def choose_leaves(ranks: Mapping[str, Rank], leaves: Sequence[Leaf]) -> list[AdaptedLeaf]:
    """Lists the leaves that the rules adapt, scaled by 1, with dims "" where no rule says them.

    Of `{glob: rank, (rank, dims) or None}` the first match wins. Raises StepError with every glob
    that matches nothing or never first, and every leaf that cannot be adapted.
    """
    problems, adapted = [], []
    options = {"explain": _explain_rank, "example": '{"**/kernel": 8}', "headline": _HEADLINE}
    for leaf, value in choose_by_globs("ranks", ranks, leaves, **options):
        rank, dims = value if isinstance(value, tuple) else (value, "")
        problems += _find_unfit(leaf, dims)
        adapted.append(AdaptedLeaf(leaf, rank, dims, 1.0))
    raise_all(StepError, _HEADLINE, problems)
    return adapted


def scale_leaves(
    adapted: Sequence[AdaptedLeaf], alpha: Alpha, rank_stabilized: bool
) -> list[AdaptedLeaf]:
    """Scales leaves by alpha / rank or alpha / √rank; those without an alpha stay as they are.

    Raises StepError with every glob of an alpha that matches none or never first.
    """
    alphas: dict[str, Any] = {one.leaf.path: alpha for one in adapted}
    if isinstance(alpha, Mapping):
        leaves = [one.leaf for one in adapted]
        options = {"explain": _explain_alpha, "example": '{"**/kernel": 16}', "headline": _HEADLINE}
        chosen = choose_by_globs("alpha", alpha, leaves, **options)
        alphas = {leaf.path: value for leaf, value in chosen}
    return [
        one
        if (own := alphas.get(one.leaf.path)) is None
        else dataclasses.replace(one, scale=own / (one.rank**0.5 if rank_stabilized else one.rank))
        for one in adapted
    ]


def choose_by_globs(
    argument: str,
    values: Mapping[str, Any],
    leaves: Sequence[Leaf],
    *,
    explain: Callable[[Any], str],
    example: str,
    headline: str,
) -> list[tuple[Leaf, Any]]:
    """Lists the leaves that `{glob: value}` chooses, with their values; those of None are left out.

    The first match wins. `explain` says why a value is none; "" if it is one. Errors have the
    user's `argument`, an `example` that is right, and a headline. Raises StepError with every glob
    that matches nothing or never first, every value that is wrong, or that no leaf is chosen.
    """
    if not isinstance(values, Mapping):
        raise StepError.of(headline, argument, f"is of type {type(values).__name__}", example)
    problems, paths = [], [leaf.path for leaf in leaves]
    winners = {path: next((g for g in values if matches(g, path)), None) for path in paths}
    for glob, value in values.items():
        if why := explain(value):
            problems.append(Problem(f"{glob!r}: {value!r}", why, example))
        if not any(matches(glob, path) for path in paths):
            why = f"matches none of the {len(paths)} parameters.{did_you_mean(glob, paths)}"
            problems.append(Problem(repr(glob), why, "correct or remove it"))
        elif glob not in winners.values():
            why = "decides nothing: a glob before it matches each of its parameters"
            problems.append(Problem(repr(glob), why, "name it before the wider one"))
    chosen = [(leaf, values[g]) for leaf in leaves if (g := winners[leaf.path]) is not None]
    chosen = [(leaf, value) for leaf, value in chosen if value is not None]
    if not chosen and not problems:
        why = "chooses no parameter: every value is None, or there is none"
        problems.append(Problem("the globs", why, example))
    raise_all(StepError, headline, problems)
    return chosen


def loss_problems(loss_fn: Any) -> list[Problem]:
    """Why a loss cannot be traced and evaluated again with other weights."""
    if not isinstance(loss_fn, ShardMapLoss):
        return []
    why = "is an sk.ShardMapLoss, whose local loss has its own collectives"
    return [Problem("loss_fn", why, "loss_fn.reference")]


def infer_by_names(adapted: Sequence[AdaptedLeaf]) -> list[AdaptedLeaf]:
    """Completes dims: stacked ones by their logical axes, then [input, output].

    Raises StepError for a leaf with other than two dims that are not stacked.
    """
    problems, complete = [], []
    for one in adapted:
        names = one.leaf.axes or (None,) * len(one.leaf.shape)
        stacked = [name in _STACKED for name in names]
        plain = iter("io")
        dims = one.dims
        if not dims and stacked.count(False) == 2:
            dims = "".join("s" if s else next(plain) for s in stacked)
        if not dims:
            why = f"has {len(names)} dims, of which any may be inputs, outputs or stacked"
            fix = f'say it, as in ({one.rank}, "{"sioo"[-len(names) :]}"); or give batch=, from '
            problems.append(Problem(str(one.leaf), why, f"{fix}which the products are found"))
        complete.append(dataclasses.replace(one, dims=dims))
    raise_all(StepError, _HEADLINE, problems)
    return complete


def infer_from_products(
    adapted: Sequence[AdaptedLeaf], loss: Callable[..., Any], params: Params, rest: tuple[Any, ...]
) -> list[AdaptedLeaf]:
    """Completes dims by what the products of the loss, on abstract arguments, contract.

    Raises StepError for a weight that meets no product, or products that contract different dims.
    """
    products, unknown = Products(), {one.leaf.path: one for one in adapted if not one.dims}

    def run(params: Params, *rest: Any) -> Any:
        tracked = jax.tree_util.tree_map_with_path(
            lambda path, x: (
                Tracked.start(unknown[p], x, None) if (p := path_str(path)) in unknown else x
            ),
            params,
        )
        return products.call(loss, (params, *rest), tracked, None)

    on_any_mesh(jax.eval_shape)(run, params, *rest)
    problems, complete = [], []
    for one in adapted:
        seen = sorted(products.dims.get(one.leaf.path, {one.dims}))
        if len(seen) > 1 or not {"i", "o"} <= set(seen[0]):
            why = f"is in products whose dims are {' and '.join(map(repr, seen))}"
            fix = f'leave it out of sk.lora, or fold=True and ({one.rank}, "io") or the like'
            problems.append(Problem(str(one.leaf), why, fix))
        complete.append(one if one.dims else dataclasses.replace(one, dims=seen[0]))
    raise_all(StepError, _HEADLINE, problems)
    return complete


def _explain_alpha(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = value is None or (number and 0 < value < math.inf)
    return "" if fits else "is not a positive and finite number, or None for a scale of 1"


def _explain_rank(value: Any) -> str:
    rank, dims = value if isinstance(value, tuple) and len(value) == 2 else (value, "io")
    if value is None:
        return ""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return "is not a rank of at least 1, (rank, dims), or None for no adapter"
    if not isinstance(dims, str) or not re.fullmatch(r"[sio]*", dims) or not {*"io"} <= {*dims}:
        return "has dims that are not letters i (input), o (output) and s (stacked), with both i, o"
    return ""


def _find_unfit(leaf: Leaf, dims: str) -> list[Problem]:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        fix = "another glob; if these are codes, sk.lora first and sk.quantize of what it returns"
        return [Problem(str(leaf), "is not a floating-point array", fix)]
    if len(leaf.shape) < 2 or math.prod(leaf.shape) == 0:
        return [Problem(str(leaf), "is no matrix: it needs inputs and outputs", "another glob")]
    if dims and len(dims) != len(leaf.shape):
        why = f"has {len(leaf.shape)} dims, and {dims!r} names {len(dims)}"
        return [Problem(str(leaf), why, "one letter per dim")]
    return []
