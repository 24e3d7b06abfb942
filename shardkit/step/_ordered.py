"""Callbacks in order, as `jax.debug.print(..., ordered=True)`: JAX has them on one device alone."""

from collections.abc import Iterable, Iterator

from jax.extend import core
from jax.sharding import Mesh

from .._core.equations import user_line
from .._core.errors import Problem, StepError, raise_all
from .._core.rewriting import Changes
from ..rules import format_mesh


def check_ordered(equations: Iterable[core.JaxprEqn], mesh: Mesh) -> None:
    """Raises StepError with the line of every callback in order, on several devices."""
    if mesh.size > 1:
        headline = f"A callback cannot keep its order on mesh {format_mesh(mesh.shape)}."
        raise_all(StepError, headline, list(dict.fromkeys(_problems(equations))))


def refuse_ordered(mesh: Mesh) -> Changes:
    """Refuses such a callback before a function is mapped, which JAX fails at."""

    def check(equation: core.JaxprEqn) -> core.JaxprEqn:
        check_ordered([equation], mesh)
        return equation

    return {"io_callback": check}


def _problems(among: Iterable[core.JaxprEqn]) -> Iterator[Problem]:
    for equation in among:
        ordered = any(str(effect).startswith("Ordered") for effect in equation.effects)
        if ordered and not any(core.jaxprs_in_params(equation.params)):
            subject = " ".join(filter(None, [equation.primitive.name, user_line(equation)[0]]))
            why = "is ordered, and each device has a callback of its own"
            yield Problem(subject, why, "ordered=False")
