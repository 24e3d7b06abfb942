"""Finds which random draws of a loss grow with the rows of its batch, and refuses what cannot.

Nothing is guessed: the loss is traced with the rows of one part and with all of them, and the
shapes of its draws are compared. A draw that grows with the rows must come from the key that the
loss gets; a key that the loss makes itself would draw the same for every part.
"""

import dataclasses
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .equations import user_line
from .errors import Problem, StepError, first_line, raise_all
from .source import Frame, is_user_file
from .split_rng import (
    Drawn,
    GrownDim,
    RandomDraws,
    Shape,
    is_part_key,
    key_problems,
    part_keys,
    threefry_words,
)
from .tree import short_type
from .types import PyTree

_HEADLINE = "The random draws of the loss cannot be split over gradient shards."
_DRAWING = ("random_bits", "random_split", "random_fold_in", "random_gamma")
_WHOLE = 'the whole batch at once: mode="auto", accumulate=1, no reduce_dtype'


@dataclasses.dataclass(frozen=True)
class Draw:
    """One random operation of a loss."""

    # `"bits"`, `"split"`, `"fold_in"` or `"gamma"`; or `"repeat"`, where keys become more keys
    kind: str
    shape: Shape  # what one key draws; of a fold the shape of the numbers
    keys: Shape  # shape of the keys that draw
    from_key: bool  # whether it draws from the key that the loss gets
    line: str = dataclasses.field(compare=False)  # the user's `file:line in function`

    @property
    def drawn(self) -> Drawn:
        """What the generator is asked for: gamma draws from one key for each of its elements."""
        return (
            ("split", (math.prod(self.shape),)) if self.kind == "gamma" else (self.kind, self.shape)
        )


def match_draws(
    loss: Callable[..., Any],
    shards: int,
    shard_args: tuple[Any, ...],
    all_args: tuple[Any, ...],
    keys: int = 1,
    folds_followed: bool = False,
) -> RandomDraws:
    """Traces a loss with the rows of one gradient shard and with all rows, and matches its draws.

    The arguments are abstract, with the rows of one shard and of all; the last `keys` of them are
    keys. For `folds_followed` see `match_dims`. Raises StepError if a draw depends on the number of
    rows in a way that cannot be split.
    """
    part, whole = (
        list_draws(trace_in_part(loss, args, keys)[0].jaxpr) for args in (shard_args, all_args)
    )
    return RandomDraws(shards, match_dims(part, whole, shards, folds_followed=folds_followed))


def trace_in_part(
    run: Callable[..., Any], args: Sequence[Any], keys: int = 1
) -> tuple[core.ClosedJaxpr, PyTree]:
    """Traces a function with keys of the kind that it gets where rows are split.

    The last `keys` of its abstract arguments are keys. Returns the jaxpr and the abstract results.
    Raises StepError if JAX draws with such a key otherwise, or not at all.
    """

    def in_part(*args: Any) -> Any:
        own = (part_keys(threefry_words(k), RandomDraws(1), 0, 0) for k in args[-keys:])
        return run(*args[:-keys], *own)

    try:
        traced, results = jax.make_jaxpr(in_part, return_shape=True)(*args)
    except Exception as error:  # a user's code
        # What fails with any key is no matter of keys, and raised as it is.
        jax.make_jaxpr(lambda *args: run(*args))(*args)
        reason = f"{type(error).__name__}: {first_line(error)}"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
        line = ""
        if frames:
            line = f" ({Frame(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name)})"
        why = f"takes no key of a part of the rows: {reason[:160]}{line}"
        raise_all(StepError, _HEADLINE, [Problem("loss_fn", why, _WHOLE)])
        raise
    drawn = next((draw for draw in list_draws(traced.jaxpr) if draw.from_key), None)
    if drawn is not None:
        raise_all(StepError, _HEADLINE, key_problems(args[-1].dtype, drawn.line))
    return traced, results


def match_dims(
    part: list[Draw], whole: list[Draw], parts: int, *, folds_followed: bool = False
) -> tuple[tuple[Drawn, GrownDim], ...]:
    """Finds the dim along which each draw of a loss on a part of its rows is larger for the whole.

    A part may also be one of the length. `folds_followed` says that numbers which are folded into a
    key once a row are known to be the batch's own: `step/rows/` refuses those that count rows.
    Returns what the generator is asked for and its grown dim, for each draw that grows: a dropout
    mask bits[4, 8] that is bits[12, 8] for 3 times the rows has `(("bits", (4, 8)), GrownDim((4,
    8), 0))`. Raises StepError if a draw grows in another way, or from another key.
    """
    problems: list[Problem] = []
    # As many keys as rows are then from a split into a key for each, and draw for one row alone.
    by_split = not any(
        draw.kind == "repeat" or (draw.kind == "fold_in" and (draw.keys or draw.shape))
        for draw in (*part, *whole)
    )
    part, whole = ([draw for draw in draws if draw.kind != "repeat"] for draws in (part, whole))
    if [draw.kind for draw in part] != [draw.kind for draw in whole]:
        why = "the number of its random draws depends on the number of rows"
        problems.append(Problem("loss_fn", why))
    dims: dict[Drawn, GrownDim | None] = {}
    for draw, of_whole in zip(part, whole, strict=False):
        large = of_whole.shape
        dim = _find_grown_dim(draw.shape, large, parts)
        if draw.kind == "fold_in" and (folds_followed or draw.shape == large):
            continue
        if by_split and draw.shape == large and draw.keys != of_whole.keys:
            continue
        grown = None if dim is None else GrownDim(draw.shape, dim)
        why = fix = ""
        if draw.kind == "fold_in":
            why = "folds in numbers counted over the rows of the batch, or over the length"
        elif draw.shape != large and not draw.from_key:
            why = "draws from a key that the loss makes itself: every part would draw the same"
            fix = "noise drawn from the key that the loss gets"
        elif grown is None and draw.shape != large:
            why = f"is {large} for {parts} times the rows"
        elif draw.from_key and dims.setdefault(draw.drawn, grown) != grown:
            why = "is drawn once for the rows and once for something else of the same shape"
            fix = (
                "an accumulate or a mesh of another size, so that parts have other numbers of rows"
            )
        if why:
            subject = f"{draw.kind} {short_type(draw.shape, jnp.uint32.dtype)}"
            problems.append(Problem(subject, why + (draw.line and f" ({draw.line})"), fix))
    raise_all(StepError, _HEADLINE, problems, f'sk.Accumulate(k, reduce="every"); or {_WHOLE}')
    return tuple((drawn, grown) for drawn, grown in dims.items() if grown is not None)


def _find_grown_dim(small: Shape, large: Shape, parts: int) -> int | None:
    """The only dim in which two shapes differ, if it is `parts` times as large in the second."""
    if len(small) != len(large):
        return None
    changed = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    fits = len(changed) == 1 and small[changed[0]] * parts == large[changed[0]]
    return changed[0] if fits else None


def list_draws(jaxpr: core.Jaxpr, around: tuple[core.JaxprEqn, ...] = ()) -> list[Draw]:
    """Lists every draw of a jaxpr in order.

    `around` are the equations that it is inside of, the innermost first: their lines are the user's
    where an operation is of JAX's own functions.
    """
    draws = []
    for eqn in jaxpr.eqns:
        stack = (eqn, *around)
        draws += _draws_of(stack)
        for inner in core.jaxprs_in_params(eqn.params):
            draws += list_draws(inner, stack)
    return draws


def _draws_of(stack: tuple[core.JaxprEqn, ...]) -> list[Draw]:
    eqn, *_ = stack
    kind = eqn.primitive.name.removeprefix("random_")
    if eqn.primitive.name not in _DRAWING:
        return _repeated_keys(eqn)
    avals: tuple[Any, ...] = (eqn.invars[0].aval, eqn.invars[-1].aval, eqn.outvars[0].aval)
    key, operand, drawn = avals
    shapes = {"fold_in": operand.shape, "gamma": drawn.shape[len(key.shape) :]}
    shape = shapes[kind] if kind in shapes else eqn.params["shape"]
    # Found for draws alone: to look up the line of every equation takes longer than the trace.
    line = next((line for line, _ in map(user_line, stack) if line), "")
    return [Draw(kind, tuple(shape), tuple(key.shape), is_part_key(key.dtype), line)]


def _repeated_keys(eqn: core.JaxprEqn) -> list[Draw]:
    """Keys of which an equation makes more: a broadcast, or a look-up by many indices."""
    moves = bool(eqn.invars) and not any(core.jaxprs_in_params(eqn.params))
    avals: list[Any] = [eqn.invars[0].aval, eqn.outvars[0].aval] if moves and eqn.outvars else []
    if not avals or not all(is_part_key(aval.dtype) for aval in avals):
        return []
    key, made = (tuple(aval.shape) for aval in avals)
    more = math.prod(made) > math.prod(key)
    return [Draw("repeat", made, key, from_key=False, line="")] if more else []
