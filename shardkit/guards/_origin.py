"""Where in a program the first number appears that is not finite.

The program is run once more with a flag behind every operation: are its results not finite
though all its operands are? Scans are followed into their iterations, so that the flag tells
the layer. It is compiled as a whole, at about the price of the program itself.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from ..inspect._scope import scope_of

_PACKAGE = str(Path(__file__).parents[1])

# Operations that run one jaxpr once, by the name of the parameter that holds it.
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
    """The first operation that made something not finite of finite operands.

    Attributes:
      operation: name of the primitive, `log`.
      scope: the model's own scopes, `layers/mlp`; empty where it has none.
      iterations: of each loop around it, the outermost first, counted from 0: the layer in a
        model whose layers are scanned.
      source: `file:line` of the user's code; empty where it is not known.
    """

    operation: str
    scope: str
    iterations: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        """Returns `log in layers/mlp, iteration 2 (model.py:31)`."""
        inside = f" in {self.scope}" if self.scope else ""
        turns = ", ".join(map(str, self.iterations))
        turn = f", iteration {turns}" if turns else ""
        return f"{self.operation}{inside}{turn}" + (f" ({self.source})" if self.source else "")


@dataclasses.dataclass(frozen=True)
class _Site:
    """An operation: where it stands in its jaxpr and those around it, and which loops run it.

    Attributes:
      eqn: the operation.
      path: scopes around it.
      order: its place in each jaxpr around it, and in its own.
      loops: (index into `order`, length, whether it runs backwards) of each loop around it.
    """

    eqn: Any
    path: str
    order: tuple[int, ...]
    loops: tuple[tuple[int, int, bool], ...]


_Flags = list[tuple[_Site, jax.Array]]


def first_nonfinite(jaxpr: ClosedJaxpr, args: Sequence[Any]) -> Origin | None:
    """Runs a program and finds the first operation whose result stops being finite.

    Args:
      jaxpr: the program; what it does on shards, and inside branches and loops of unknown
        length, counts as one operation.
      args: its arguments, flat.

    Returns:
      The operation, or None where none makes such a number from finite ones: the arguments
      hold it already, or there is none.
    """
    sites: list[_Site] = []

    def run(consts: Sequence[Any], given: Sequence[Any]) -> list[jax.Array]:
        _, flags = _evaluate(jaxpr.jaxpr, consts, given, "", (), ())
        sites[:] = [site for site, _ in flags]
        return [flag for _, flag in flags]

    found = [np.asarray(flag) for flag in jax.jit(run)(jaxpr.consts, list(args))]
    times = [(_time(site, at), site, at) for site, flag in zip(sites, found, strict=True)
             for at in np.argwhere(flag)]  # fmt: skip
    if not times:
        return None
    _, site, at = min(times, key=lambda one: one[0])
    name = site.eqn.primitive.name
    scope = scope_of(f"{site.path}/{name}")
    return Origin(name, scope, tuple(map(int, at)), _source(site.eqn))


def _time(site: _Site, at: np.ndarray) -> tuple[int, ...]:
    """When an operation ran: places in jaxprs and turns of loops, comparable with any other's."""
    turns = {
        index: length - 1 - int(i) if backwards else int(i)
        for (index, length, backwards), i in zip(site.loops, at, strict=True)
    }
    return tuple(x for i, place in enumerate(site.order) for x in (place, turns.get(i, 0)))


def _evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    path: str,
    order: tuple[int, ...],
    loops: tuple[tuple[int, int, bool], ...],
) -> tuple[list[Any], _Flags]:
    """Runs a jaxpr; a flag has one dim for each loop inside the jaxpr that was asked for."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    flags: _Flags = []

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for place, eqn in enumerate(jaxpr.eqns):
        given = [read(var) for var in eqn.invars]
        stack = str(eqn.source_info.name_stack)
        here = "/".join(filter(None, (path, stack)))
        name, at = eqn.primitive.name, (*order, place)
        if name in _ONCE and _ONCE[name] in eqn.params:
            inner = eqn.params[_ONCE[name]]
            closed = isinstance(inner, ClosedJaxpr)
            body, held = (inner.jaxpr, inner.consts) if closed else (inner, ())
            made, found = _evaluate(body, held, given, here, at, loops)
        elif name == "scan":
            made, found = _scanned(eqn, given, here, at, loops)
        else:
            made = _bind(eqn, given)
            flag = ~_finite(made) & _finite(given)
            found = [(_Site(eqn, here, at, loops), flag)]
        flags += found
        values.update(zip(eqn.outvars, made, strict=True))
    return [read(var) for var in jaxpr.outvars], flags


def _scanned(
    eqn: Any,
    given: Sequence[Any],
    path: str,
    order: tuple[int, ...],
    loops: tuple[tuple[int, int, bool], ...],
) -> tuple[list[Any], _Flags]:
    p = eqn.params
    fixed, carried = _arity(eqn)
    consts, carry, xs = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]
    inside = (*loops, (len(order) - 1, p["length"], p["reverse"]))
    sites: list[_Site] = []

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        inner = p["jaxpr"]
        made, found = _evaluate(
            inner.jaxpr, inner.consts, [*consts, *carry, *x], path, order, inside
        )
        sites[:] = [site for site, _ in found]
        return made[:carried], (made[carried:], [flag for _, flag in found])

    last, (ys, flags) = jax.lax.scan(
        body, list(carry), list(xs), length=p["length"], reverse=p["reverse"]
    )
    return [*last, *ys], list(zip(sites, flags, strict=True))


def _arity(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan stay fixed, and how many it carries.

    Its parameters say so under names that change between versions of JAX. What is scanned over
    or collected has one dim more outside than in the body; a carried value comes and goes.
    """
    body = eqn.params["jaxpr"].jaxpr

    def alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(one.aval.shape) == len(other.aval.shape) for one, other in pairs)

    carried = alike(eqn.outvars, body.outvars)
    return alike(eqn.invars, body.invars) - carried, carried


def _bind(eqn: Any, given: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        made = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    return list(made) if eqn.primitive.multiple_results else [made]


def _finite(values: Sequence[Any]) -> jax.Array:
    floats = [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all() if floats else jnp.bool_(True)


def _source(eqn: Any) -> str:
    """The innermost line that is no library's: neither installed nor part of this package."""
    trace = eqn.source_info.traceback
    for frame in trace.frames if trace else ():
        name = frame.file_name
        if "site-packages" not in name and not name.startswith((_PACKAGE, "<")):
            return f"{name}:{frame.line_num}"
    return ""
