"""Facts that only the author of a program knows, written into its scope names for reports to read.

The compiler keeps the path of `jax.named_scope`s and jitted functions of every operation. Four
facts travel in it: that a hand-written backward pass recomputes something, so that FLOP counts can
tell it from the model's own work, how often each branch of a conditional runs, which no compiled
program says, that an update moves whole matrices, and that a step computes something in place of
the model.
"""

import contextlib
import fractions
import re
from collections.abc import Iterable
from typing import Any

import jax

RECOMPUTED = "rematted_computation"
"""The scope in which `jax.checkpoint` puts what it recomputes."""

MATRIX_OWNERS = "matrix_owners"
"""The scope of an update in which whole matrices are moved to their owners, and computed there."""

OF_THE_STEP = "shardkit_in_place"
"""Name of the jitted functions that a step computes in place of operations of the model."""

OWNED = "owned"
"""Kind of the fact `(mesh axis, bytes), …`: the fewest that one device sends for its matrices."""

UNDIVIDED = "undivided"
"""Kind of a fact without a value: products of an optimizer of the user's own have no owners."""

RING_BLOCKS = "ring_blocks"
"""Kind of the fact `number`: blocks of keys and values that a ring sends to a device."""

_SHARE = re.compile(rf"{RECOMPUTED}_(\d+)_of_(\d+)")

_PREFIX = "shardkit_taken"  # unlike the name of any user's scope
BRANCH_COUNTS = re.compile(rf"\b{_PREFIX}(_apart)?((?:_\d+)+)\b")


def recomputed(times: int = 1, of: int = 1) -> contextlib.AbstractContextManager[Any]:
    """Marks operations traced in the block as recomputation, as `jax.checkpoint` marks its own.

    Of all executions, over all devices, so many `times` recompute a value; the others compute it
    for the first time.

    >>> from shardkit.report import count_flops
    >>> def product(x):
    ...     with recomputed():
    ...         return x @ x
    >>> counted = count_flops(jax.make_jaxpr(product)(jax.numpy.ones((2, 2))))
    >>> counted.model, counted.recompute
    (0, 16)
    """
    return jax.named_scope(RECOMPUTED if times == of else f"{RECOMPUTED}_{times}_of_{of}")


def recomputed_share(path: str) -> fractions.Fraction:
    """Returns the share of an operation's executions that recompute, given its path of scopes.

    >>> recomputed_share("jvp(rematted_computation_3_of_4)/mlp/dot_general")
    Fraction(3, 4)
    """
    share = _SHARE.search(path)
    return fractions.Fraction(int(share[1]), int(share[2])) if share else fractions.Fraction(1)


def annotate_branch_counts(
    counts: Iterable[int], divergent: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """Annotates the conditional traced in the block with how often each of its branches runs.

    Only the ratio of the counts matters. `divergent` devices take different branches in one
    execution.

    >>> def mostly_sqrt(x):
    ...     with annotate_branch_counts([1, 3]):
    ...         return jax.lax.cond(x > 0, abs, jax.numpy.sqrt, x)
    >>> str(jax.make_jaxpr(mostly_sqrt)(1.0).eqns[-1].source_info.name_stack)
    'shardkit_taken_1_3'
    """
    suffix = "".join(f"_{int(n)}" for n in counts)
    return jax.named_scope(_PREFIX + "_apart" * divergent + suffix)


def is_divergent(op_name: str) -> bool:
    """Whether an operation, by its path, is in a branch that only some devices take at a time.

    The text of a whole program asks for any such operation.

    >>> is_divergent("jit(step)/while/body/shardkit_taken_apart_1_3/cond/branch_1_fun/add")
    True
    """
    return any(marker.group(1) for marker in BRANCH_COUNTS.finditer(op_name))


def branch_shares(op_name: str, branches: int) -> tuple[fractions.Fraction, ...] | None:
    """Returns the share of a conditional's executions in which each branch runs, by its path.

    None if the conditional itself is not annotated (the annotation of an enclosing one does not
    count), or is annotated for another number of branches.

    >>> branch_shares("jit(step)/while/body/shardkit_taken_1_3/cond", 2)
    (Fraction(1, 4), Fraction(3, 4))
    >>> branch_shares("jit(step)/while/body/shardkit_taken_1_3/cond/branch_1_fun/cond", 2) is None
    True
    """
    *_, scope, _ = ("", *op_name.split("/"))
    marker = BRANCH_COUNTS.search(scope)
    if marker is None:
        return None
    counts = [int(n) for n in marker.group(2)[1:].split("_")]
    if len(counts) != branches:
        return None
    return tuple(fractions.Fraction(n, sum(counts) or 1) for n in counts)
