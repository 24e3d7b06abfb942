"""A traced loss with its gradient as one flat list of operations, loops as bodies of their own.

Calls (`jit`, `remat2`, custom derivatives) are inlined, markers that change no value are skipped,
and dead code is dropped, as every compiler does.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .._core.own_sharding import CONSTRAINT

# Identities as far as bytes go.
_IDENTITIES = frozenset(
    f"""name shardkit_record shardkit_use_param shardkit_without_gradient stop_gradient copy
    optimization_barrier pvary reshard {CONSTRAINT}""".split()
)
_OWN_CONSTRAINT = (
    "with_sharding_constraint names mesh axes in the model: only meshes with these compile, and "
    "what it moves is not counted"
)
# Parameters that hold derivative rules, not the function itself.
_DERIVATIVES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "fwd", "jvp_jaxpr_thunk", "update_jaxpr"}
_LOOPS = {"scan", "while"}
# Per-device or foreign code: shapes inside are not those of the program.
_OPAQUE = {"shard_map", "pallas_call", "ffi_call", "pure_callback", "io_callback"}


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation."""

    name: str  # of its primitive
    params: Mapping[str, Any]  # those of the primitive
    ins: tuple[int | None, ...]  # numbers of the values it reads; None for a literal
    outs: tuple[int, ...]  # numbers of the values it computes
    body: "FlatProgram | None" = None  # the program that a loop repeats
    trips: int = 1  # number of times that it does


@dataclasses.dataclass(frozen=True)
class FlatProgram:
    """A program as operations in order, its values numbered."""

    ops: tuple[Op, ...]  # the operations
    inputs: tuple[int, ...]  # numbers of the arguments
    outputs: tuple[int | None, ...]  # numbers of the results; None for a literal
    avals: Mapping[int, Any]  # number → abstract array of every value, those of inner bodies too
    problems: tuple[str, ...] = ()  # operations that cannot be read


def flatten_jaxpr(closed: ClosedJaxpr) -> FlatProgram:
    """Flattens a closed jaxpr."""
    return _Flattener().flatten(closed.jaxpr)


class _Flattener:
    """Gives every value a number, also across inner jaxprs."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.avals: dict[int, Any] = {}
        self.problems: list[str] = []

    def flatten(self, jaxpr: Jaxpr) -> FlatProgram:
        env: dict[Any, int | None] = {
            var: self._number(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)
        }
        inputs = [number for number in env.values() if number is not None]
        ops = list(self._ops(jaxpr, env))
        outputs = tuple(_number_of(env, v) for v in jaxpr.outvars)
        return FlatProgram(
            tuple(_drop_unused(ops, outputs)),
            tuple(inputs),
            outputs,
            self.avals,
            tuple(self.problems),
        )

    def _number(self, aval: Any) -> int:
        number = next(self.numbers)
        self.avals[number] = aval
        return number

    def _ops(self, jaxpr: Jaxpr, env: dict[Any, int | None]) -> Iterator[Op]:
        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, tuple(_number_of(env, v) for v in eqn.invars)
            if name == CONSTRAINT and _OWN_CONSTRAINT not in self.problems:
                self.problems.append(_OWN_CONSTRAINT)
            if name in _IDENTITIES and len(ins) == len(eqn.outvars):
                env.update(zip(eqn.outvars, ins, strict=True))
                continue
            inner = [] if name in _LOOPS | _OPAQUE else list(_inner_jaxprs(eqn.params))
            if name == "cond":
                inner = [max(eqn.params["branches"], key=lambda b: len(b.jaxpr.eqns)).jaxpr]
            if inner and len(inner[0].invars) == len(ins) - (name == "cond"):
                yield from self._inline(inner[0], eqn, ins[name == "cond" :], env)
                continue
            outs = tuple(self._number(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
            yield self._op(eqn, ins, outs)

    def _inline(
        self, jaxpr: Jaxpr, eqn: Any, ins: tuple[int | None, ...], env: dict[Any, int | None]
    ) -> Iterator[Op]:
        inside: dict[Any, int | None] = {v: self._number(v.aval) for v in jaxpr.constvars}
        inside.update(zip(jaxpr.invars, ins, strict=True))
        yield from self._ops(jaxpr, inside)
        env.update(zip(eqn.outvars, (_number_of(inside, v) for v in jaxpr.outvars), strict=True))

    def _op(self, eqn: Any, ins: tuple[int | None, ...], outs: tuple[int, ...]) -> Op:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            body, trips = self.flatten(params["jaxpr"].jaxpr), params["length"]
            return Op(name, params, ins, outs, body=body, trips=trips)
        if name == "while":
            self.problems.append("a while loop runs an unknown number of times; counted once")
            return Op(name, params, ins, outs, body=self.flatten(params["body_jaxpr"].jaxpr))
        if name in _OPAQUE or any(True for _ in _inner_jaxprs(params)):
            why = "is opaque; its products, memory and collectives are not counted"
            self.problems.append(f"{name} {why}")
        return Op(name, params, ins, outs)


def _number_of(env: Mapping[Any, int | None], var: Any) -> int | None:
    return None if isinstance(var, Literal) else env[var]


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for key, value in params.items():
        if key in _DERIVATIVES:
            continue
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _drop_unused(ops: list[Op], outputs: tuple[int | None, ...]) -> list[Op]:
    used, live = set(outputs), []
    for op in reversed(ops):
        if used.intersection(op.outs):
            used.update(op.ins)
            live.append(op)
    return live[::-1]
