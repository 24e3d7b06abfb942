"""Refuses arrays that a step has donated, which would crash the runtime."""

from typing import NoReturn

import jax
from jax import core

from .errors import Problem, StateError, StepError, raise_all
from .tracing import SETTINGS
from .tree import flatten_tree, path_str
from .types import PyTree


def check_not_donated(tree: PyTree, name: str, headline: str) -> None:
    """Raises StateError with the first three arrays of a tree that were donated to an earlier step.

    `name` is that of the tree in the message, such as `state`. Tracers and `jax.disable_jit` raise
    StepError, and dicts whose keys cannot be sorted TreeError.
    """
    if SETTINGS.jax_disable_jit:
        why = "is set, and a step is a compiled program"
        fix = "with jax.disable_jit(False): ...; to look into the loss, call loss_fn itself"
        raise StepError.of("A step cannot run without jit.", "jax_disable_jit", why, fix)
    leaves, _ = flatten_tree(tree, name)
    traced = next((x for x in leaves if isinstance(x, core.Tracer)), None)
    if traced is not None:
        raise_traced(name, f"is traced ({type(traced).__name__})")
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


def check_untraced(error: Exception) -> None:
    """Raises StepError if an error says that JAX traces the function that calls a compiled program.

    Nothing that the program takes need be traced.
    """
    if "Cannot apply JAX transformations" in str(error):
        raise_traced("step", "is called while a function is traced")


def raise_traced(subject: str, why: str) -> NoReturn:
    """Raises StepError for what a step does inside of a transformation of JAX."""
    headline = "A step cannot be called inside of a transformation of JAX."
    fix = "call the step in a Python loop, outside of jit, grad, vmap and scan"
    raise StepError.of(headline, subject, f"{why}: a step is a compiled program of its own", fix)
