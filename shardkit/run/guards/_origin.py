"""Finds the first operation of a program whose result is not finite.

The program runs once more with a flag behind every operation: its results are not finite though
all its operands are. Scans are followed into their iterations, so that the flag names the layer.
It is compiled as a whole and costs about as much as the program itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from ..._core.equations import bind, count_scan_operands, source_of_equation
from ...report import scope_of

# Primitives that run one jaxpr once, with the parameter that holds it.
_ONCE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The first operation with finite operands and a result that is not finite.

    Attributes:
      operation: name of the primitive, `log`.
      scope: the model's own scopes, `layers/mlp`; "" if there are none.
      iterations: of each loop around it, the outermost first, counted from 0: the layer of a
        model whose layers are scanned.
      source: `file:line` of the user's code; "" if unknown.
    """

    operation: str
    scope: str
    iterations: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        """Returns `log in layers/mlp, iteration 2 (model.py:31)`."""
        inside = f" in {self.scope}" if self.scope else ""
        numbers = ", ".join(map(str, self.iterations))
        iteration = f", iteration {numbers}" if numbers else ""
        return f"{self.operation}{inside}{iteration}" + (f" ({self.source})" if self.source else "")


@dataclasses.dataclass(frozen=True)
class _Site:
    """Where an operation or a jaxpr is in the program."""

    path: str = ""  # named scopes around it
    order: tuple[int, ...] = ()  # its index in each jaxpr around it, the outermost first
    # (index into `order`, length, reverse) of each scan around it
    loops: tuple[tuple[int, int, bool], ...] = ()

    def time(self, iterations: np.ndarray) -> tuple[int, ...]:
        """Returns when it ran, comparable with the times of all other sites.

        Indices and iterations alternate. Operation 2 in the body of a scan that is operation 5,
        in its iteration 3, ran at (5, 3, 2, 0): before (5, 4, 0, 0) and before (6, 0).
        """
        turns = {
            index: length - 1 - int(i) if reverse else int(i)
            for (index, length, reverse), i in zip(self.loops, iterations, strict=True)
        }
        return tuple(x for i, place in enumerate(self.order) for x in (place, turns.get(i, 0)))


# An operation, its site, and whether its result alone is not finite: bool[lengths of its scans].
_Flag = tuple[Any, _Site, jax.Array]


def first_nonfinite(jaxpr: ClosedJaxpr, args: Sequence[Any]) -> Origin | None:
    """Runs a program with flat arguments and finds the first operation whose result is not finite.

    A `shard_map`, a branch and a loop of unknown length each count as one operation. None if no
    operation makes such a number of finite operands: either the arguments contain it already, or
    everything is finite.
    """
    sites: list[tuple[Any, _Site]] = []

    def run(consts: Sequence[Any], operands: Sequence[Any]) -> list[jax.Array]:
        _, flags = _evaluate(jaxpr.jaxpr, consts, operands, _Site())
        sites[:] = [(eqn, site) for eqn, site, _ in flags]
        return [flag for *_, flag in flags]

    flags = [np.asarray(flag) for flag in jax.jit(run)(jaxpr.consts, list(args))]
    hits = [
        (site.time(iterations), eqn, site, iterations)
        for (eqn, site), flag in zip(sites, flags, strict=True)
        for iterations in np.argwhere(flag)
    ]
    if not hits:
        return None
    _, eqn, site, iterations = min(hits, key=lambda hit: hit[0])
    name = eqn.primitive.name
    scope = scope_of(f"{site.path}/{name}")
    return Origin(name, scope, tuple(map(int, iterations)), _source(eqn))


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], site: _Site
) -> tuple[list[Any], list[_Flag]]:
    """Evaluates a jaxpr; flags are relative to it, with one dim for each scan inside it."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    flags: list[_Flag] = []

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for index, eqn in enumerate(jaxpr.eqns):
        operands = [read(var) for var in eqn.invars]
        path = "/".join(filter(None, (site.path, str(eqn.source_info.name_stack))))
        here = _Site(path, (*site.order, index), site.loops)
        results, new_flags = _evaluate_eqn(eqn, operands, here)
        flags += new_flags
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars], flags


def _evaluate_eqn(eqn: Any, operands: Sequence[Any], site: _Site) -> tuple[list[Any], list[_Flag]]:
    """Evaluates one operation: follows calls and scans, and flags everything else."""
    name = eqn.primitive.name
    if name in _ONCE and _ONCE[name] in eqn.params:
        inner = eqn.params[_ONCE[name]]
        closed = isinstance(inner, ClosedJaxpr)
        body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
        return _evaluate(body, consts, operands, site)
    if name == "scan":
        return _evaluate_scan(eqn, operands, site)
    results = _bind(eqn, operands)
    return results, [(eqn, site, ~_is_finite(results) & _is_finite(operands))]


def _evaluate_scan(eqn: Any, operands: Sequence[Any], site: _Site) -> tuple[list[Any], list[_Flag]]:
    """Evaluates a scan whose body also collects the flags, so that each gets a leading dim."""
    p = eqn.params
    fixed, carried = count_scan_operands(eqn)
    consts, carry = operands[:fixed], operands[fixed : fixed + carried]
    loop = (len(site.order) - 1, p["length"], p["reverse"])
    inside = dataclasses.replace(site, loops=(*site.loops, loop))
    sites: list[tuple[Any, _Site]] = []

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        inner = p["jaxpr"]
        results, flags = _evaluate(inner.jaxpr, inner.consts, [*consts, *carry, *x], inside)
        sites[:] = [(eqn, site) for eqn, site, _ in flags]
        return results[:carried], (results[carried:], [flag for *_, flag in flags])

    xs = list(operands[fixed + carried :])
    last, (ys, flags) = jax.lax.scan(
        body, list(carry), xs, length=p["length"], reverse=p["reverse"]
    )
    return [*last, *ys], [(*site, flag) for site, flag in zip(sites, flags, strict=True)]


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        return bind(eqn, operands)


def _is_finite(values: Sequence[Any]) -> jax.Array:
    floats = [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all() if floats else jnp.bool_(True)


def _source(eqn: Any) -> str:
    """Returns `file:line` of the user's code that made an equation."""
    source = source_of_equation(eqn)
    return f"{source.file}:{source.line}" if source else ""
