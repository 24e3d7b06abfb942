"""What a backward pass written by hand computes again, said where it does and read by reports."""

import contextlib

import jax

AGAIN = "rematted_computation"
"""The name that `jax.checkpoint` gives to what it computes again."""


def again() -> contextlib.AbstractContextManager[None]:
    """Marks what is made within the block as computed again, so that no FLOP count takes it twice.

    >>> from shardkit.inspect import count_flops
    >>> def product(x):
    ...     with again():
    ...         return x @ x
    >>> counted = count_flops(jax.make_jaxpr(product)(jax.numpy.ones((2, 2))))
    >>> counted.model, counted.recompute
    (0, 16)
    """
    return jax.named_scope(AGAIN)
