"""What a backward pass written by hand computes again, said where it does and read by reports."""

import contextlib
import fractions
import re

import jax

AGAIN = "rematted_computation"
"""The name that `jax.checkpoint` gives to what it computes again."""

_PART = re.compile(rf"{AGAIN}_(\d+)_of_(\d+)")


def again(times: int = 1, of: int = 1) -> contextlib.AbstractContextManager[None]:
    """Marks what is made within the block as computed again, so that no FLOP count takes it twice.

    Args:
      times: in so many of its executions, on all devices, it is computed again.
      of: all of its executions.

    >>> from shardkit.report import count_flops
    >>> def product(x):
    ...     with again():
    ...         return x @ x
    >>> counted = count_flops(jax.make_jaxpr(product)(jax.numpy.ones((2, 2))))
    >>> counted.model, counted.recompute
    (0, 16)
    """
    return jax.named_scope(AGAIN if times == of else f"{AGAIN}_{times}_of_{of}")


def share_again(path: str) -> fractions.Fraction:
    """In which share of its executions something that is marked is computed again.

    >>> share_again("jvp(rematted_computation_3_of_4)/mlp/dot_general")
    Fraction(3, 4)
    """
    part = _PART.search(path)
    return fractions.Fraction(int(part[1]), int(part[2])) if part else fractions.Fraction(1)
