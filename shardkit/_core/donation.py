"""Arrays that a step has consumed: refused by name, where the runtime would crash."""

from typing import Any

import jax

from .errors import Problem, StateError, raise_all
from .tree import path_str


def check_not_donated(given: Any, what: str, headline: str) -> None:
    """Refuses arrays whose buffers an earlier step consumed, which would crash the interpreter.

    Args:
      given: pytree.
      what: it is: `state`.
      headline: of the error.

    Raises:
      StateError: naming the leaves that are gone.
    """
    if not any(x.is_deleted() for x in jax.tree.leaves(given) if isinstance(x, jax.Array)):
        return
    gone = [
        path_str(path)
        for path, x in jax.tree_util.tree_leaves_with_path(given)
        if isinstance(x, jax.Array) and x.is_deleted()
    ]
    shown = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    why = f"{shown}: consumed (donated) by an earlier step"
    fix = "state, metrics = step(state, batch), and use the returned state from then on"
    raise_all(StateError, headline, [Problem(what, why)], fix)
