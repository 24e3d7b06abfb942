"""A traced loss with its gradient as one flat list of operations, loops as bodies of their own.

Calls (`jit`, `remat2`, custom derivatives) are opened where they stand, marks that change no value
are seen through, and what no result needs is left out, as every compiler does.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# The identity, as far as bytes go.
_SEEN_THROUGH = {
    "name",
    "shardkit_record",
    "shardkit_use_param",
    "stop_gradient",
    "copy",
    "copy_p",
    "optimization_barrier",
    "pvary",
}
# What stands beside the function itself: rules for its derivatives.
_RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "fwd", "jvp_jaxpr_thunk", "update_jaxpr"}
_LOOPS = {"scan", "while"}
# What runs is one device's part or foreign code: shapes inside are not those of the program.
_CLOSED = {"shard_map", "pallas_call", "ffi_call", "pure_callback", "io_callback"}


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
      name: of its primitive.
      params: those of the primitive.
      ins: numbers of the values it reads; None for a literal.
      outs: numbers of the values it makes.
      body: what a loop repeats.
      trips: how often it does.
    """

    name: str
    params: Mapping[str, Any]
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    body: "Flat | None" = None
    trips: int = 1


@dataclasses.dataclass(frozen=True)
class Flat:
    """Operations in order.

    Attributes:
      ops: the operations.
      inputs: numbers of the arguments.
      outputs: numbers of the results; None for a literal.
      avals: number → abstract array of every value, those of inner bodies too.
      problems: operations that cannot be read.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    avals: Mapping[int, Any]
    problems: tuple[str, ...] = ()


def flatten(closed: ClosedJaxpr) -> Flat:
    """Flattens a closed jaxpr."""
    reader = _Reader()
    return reader.flat(closed.jaxpr)


class _Reader:
    """Gives every value a number, also across inner jaxprs."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.avals: dict[int, Any] = {}
        self.problems: list[str] = []

    def flat(self, jaxpr: Jaxpr) -> Flat:
        env: dict[Any, int | None] = {}
        for var in (*jaxpr.constvars, *jaxpr.invars):
            env[var] = self._new(var.aval)
        inputs = tuple(_number(env, v) for v in (*jaxpr.constvars, *jaxpr.invars))
        ops = list(self._ops(jaxpr, env))
        outputs = tuple(_number(env, v) for v in jaxpr.outvars)
        made = [number for number in inputs if number is not None]
        alive = _needed(ops, outputs)
        return Flat(tuple(alive), tuple(made), outputs, self.avals, tuple(self.problems))

    def _new(self, aval: Any) -> int:
        number = next(self.numbers)
        self.avals[number] = aval
        return number

    def _ops(self, jaxpr: Jaxpr, env: dict[Any, int | None]) -> Iterator[Op]:
        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, tuple(_number(env, v) for v in eqn.invars)
            if name in _SEEN_THROUGH and len(ins) == len(eqn.outvars):
                env.update(zip(eqn.outvars, ins, strict=True))
                continue
            inner = [] if name in _LOOPS | _CLOSED else list(_called(eqn.params))
            if name == "cond":
                inner = [max(eqn.params["branches"], key=lambda b: len(b.jaxpr.eqns)).jaxpr]
            if inner and len(inner[0].invars) == len(ins) - (name == "cond"):
                yield from self._opened(inner[0], eqn, ins[name == "cond" :], env)
                continue
            outs = tuple(self._new(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
            yield self._op(eqn, ins, outs)

    def _opened(
        self, jaxpr: Jaxpr, eqn: Any, ins: tuple[int | None, ...], env: dict[Any, int | None]
    ) -> Iterator[Op]:
        inside: dict[Any, int | None] = {v: self._new(v.aval) for v in jaxpr.constvars}
        inside.update(zip(jaxpr.invars, ins, strict=True))
        yield from self._ops(jaxpr, inside)
        env.update(zip(eqn.outvars, (_number(inside, v) for v in jaxpr.outvars), strict=True))

    def _op(self, eqn: Any, ins: tuple[int | None, ...], outs: tuple[int, ...]) -> Op:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return Op(name, params, ins, outs, self.flat(params["jaxpr"].jaxpr), params["length"])
        if name == "while":
            self.problems.append("a while loop runs an unknown number of times; counted once")
            return Op(name, params, ins, outs, self.flat(params["body_jaxpr"].jaxpr), 1)
        if name in _CLOSED or any(True for _ in _called(params)):
            why = "is not looked into; its products, memory and collectives are not counted"
            self.problems.append(f"{name} {why}")
        return Op(name, params, ins, outs)


def _number(env: Mapping[Any, int | None], var: Any) -> int | None:
    return None if isinstance(var, Literal) else env[var]


def _called(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for key, value in params.items():
        if key in _RULES:
            continue
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _needed(ops: list[Op], outputs: tuple[int | None, ...]) -> list[Op]:
    wanted, kept = set(outputs), []
    for op in reversed(ops):
        if wanted.intersection(op.outs):
            wanted.update(op.ins)
            kept.append(op)
    return kept[::-1]
