"""Refuses arrays that a step has donated, which would crash the runtime."""

import jax

from .errors import Problem, StateError, raise_all
from .tree import flatten_tree, path_str
from .types import PyTree


def check_not_donated(tree: PyTree, name: str, headline: str) -> None:
    """Refuses arrays whose buffers were donated to an earlier step.

    Args:
      tree: pytree of arrays.
      name: of the tree in the message, such as `state`.
      headline: first line of the error.

    Raises:
      StateError: some arrays are deleted; names the first three.
      TreeError: a dict of the tree has keys that cannot be sorted.
    """
    leaves, _ = flatten_tree(tree, name)
    if not any(x.is_deleted() for x in leaves if isinstance(x, jax.Array)):
        return
    deleted = [
        path_str(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(x, jax.Array) and x.is_deleted()
    ]
    shown = ", ".join(deleted[:3]) + (f" and {len(deleted) - 3} more" if len(deleted) > 3 else "")
    why = f"{shown}: donated to an earlier step"
    fix = "state, metrics = step(state, batch), and use the returned state from then on"
    raise_all(StateError, headline, [Problem(name, why)], fix)
