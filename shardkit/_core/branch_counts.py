"""How often each branch of a conditional is taken, where the program that makes it knows.

A compiled program has a conditional's branches, not how often each runs. A schedule that is worked
off as a table does know. It says so in the name of the conditional, which the compiler keeps; and
so it says that devices take different branches at the same time.
"""

import contextlib
import fractions
import re
from collections.abc import Iterable, Iterator

import jax

# Spelled so that no scope of a user's has it.
_PREFIX = "shardkit_taken"
NAME = re.compile(rf"\b{_PREFIX}(_apart)?((?:_\d+)+)\b")


@contextlib.contextmanager
def taken(times: Iterable[int], apart: bool = False) -> Iterator[None]:
    """Names the conditional that is made within the block by how often each branch is taken.

    Args:
      times: for branch 0, 1, …, in all executions on all devices; only their shares count.
      apart: devices take different branches in the same execution.

    >>> def often(x):
    ...     with taken([1, 3]):
    ...         return jax.lax.cond(x > 0, abs, jax.numpy.sqrt, x)
    >>> str(jax.make_jaxpr(often)(1.0).eqns[-1].source_info.name_stack)
    'shardkit_taken_1_3'
    """
    with jax.named_scope(_PREFIX + "_apart" * apart + "".join(f"_{int(n)}" for n in times)):
        yield


def apart(op_name: str) -> bool:
    """Whether an operation stands in a branch that only some devices take at a time.

    Args:
      op_name: its path of scopes.

    >>> apart("jit(step)/while/body/shardkit_taken_apart_1_3/cond/branch_1_fun/add")
    True
    """
    return any(found.group(1) for found in NAME.finditer(op_name))


def shares(op_name: str, branches: int) -> tuple[fractions.Fraction, ...] | None:
    """Share of its executions in which each branch of a conditional is taken.

    Args:
      op_name: the conditional's path of scopes, whose last part is its own name.
      branches: how many it has.

    Returns:
      None where nothing is said of this conditional, or of another number of branches; of one
      around it something may be.

    >>> shares("jit(step)/while/body/shardkit_taken_1_3/cond", 2)
    (Fraction(1, 4), Fraction(3, 4))
    >>> shares("jit(step)/while/body/shardkit_taken_1_3/cond/branch_1_fun/cond", 2) is None
    True
    """
    _, _, own = op_name.rpartition("/")[0].rpartition("/")
    found = NAME.search(own)
    if found is None:
        return None
    times = [int(n) for n in found.group(2)[1:].split("_")]
    if len(times) != branches:
        return None
    return tuple(fractions.Fraction(n, sum(times) or 1) for n in times)
