"""Evaluates a program that was traced without types on typed values of shards.

Where operands, carries or branches differ in the mesh axes that they vary over, the narrower ones
are cast with `pcast`, as JAX itself does for the operands of a sum. JAX checks every result as if
the model had written the casts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ..._core.equations import evaluate, open_jaxpr, user_line
from ..._core.errors import StepError, first_line
from ..._core.types import PyTree
from ...nn._manual_axis_rules import Axes, pvary, untyped, vary_p, varying_axes
from ._axis_types import (
    AxisTypes,
    branch_types,
    follow_types,
    rename_axes,
    scan_types,
    split_scan,
    split_while,
    while_types,
)

Values = Sequence[Any]

_INLINED = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
_REMAT = ("checkpoint", "remat2")
_DERIVED = ("custom_jvp_call", "custom_vjp_call")
_SUMMED = {"psum": jax.lax.psum, "pmax": jax.lax.pmax, "pmin": jax.lax.pmin}


@dataclasses.dataclass(frozen=True)
class UntypedProgram:
    """A function of one device's arrays, traced without types."""

    jaxpr: core.Jaxpr  # takes the captured arrays, then the arguments
    captured: list[jax.Array]  # arrays that the function closes over


@dataclasses.dataclass(frozen=True)
class DerivativeRule:
    """The derivative rule that a function brings, as programs."""

    forward: UntypedProgram  # `args → results, residuals`
    # cotangents → `residuals, cotangents → cotangents of the chosen arguments`
    trace_backward: Callable[[Values], UntypedProgram]


@dataclasses.dataclass(frozen=True)
class ShardAxes:
    """The axes that a function of shards may name."""

    mesh: Mesh  # the device mesh, all of whose axes are manual
    rows: Axes  # mesh axes that split the rows
    batch: tuple[str, ...]  # other names for these together, in the user's loss

    def whole_mesh(self) -> Mesh | AbstractMesh:
        """The mesh, with one more axis for each name of the batch."""
        if not self.batch:
            return self.mesh
        count = math.prod(self.mesh.shape[axis] for axis in self.rows)
        sizes = {**self.mesh.shape, **dict.fromkeys(self.batch, count)}
        kinds = (AxisType.Auto,) * len(sizes)
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def trace_untyped(
    axes: ShardAxes, run: Callable[..., PyTree], args: Values
) -> tuple[UntypedProgram, PyTree]:
    """Traces a function of one device's arrays; returns the program and its results' shapes."""
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    specs: Any = PartitionSpec()
    on_device = jax.shard_map(
        run, mesh=axes.whole_mesh(), in_specs=specs, out_specs=specs, check_vma=False
    )
    with untyped(), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        outer, shapes = jax.make_jaxpr(on_device, return_shape=True)(*avals)
    (equation,) = outer.jaxpr.eqns
    consts = dict(zip(outer.jaxpr.constvars, outer.consts, strict=True))
    captured = [consts[v] for v in equation.invars if v in consts]
    body, _ = open_jaxpr(equation.params["jaxpr"])
    if axes.batch:
        body = rename_axes(body, dict.fromkeys(axes.batch, axes.rows))
    return UntypedProgram(body, captured), shapes


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates programs inside a `shard_map`."""

    axes: ShardAxes  # what the programs may name

    def run(self, program: Any, args: Values) -> list[Any]:
        """Returns the results of a program on typed values."""
        return evaluate(program, args, lambda _, equation, values: self._evaluate(equation, values))

    def differentiate(
        self, equation: core.JaxprEqn, args: Values, chosen: Sequence[bool] | None = None
    ) -> DerivativeRule:
        """Traces the derivative rule of a function, for the chosen ones of its arguments.

        Those are all floats if not given.
        """
        chosen = [_is_float(x) for x in args] if chosen is None else chosen

        def forward(*args: Any) -> Any:
            def of_chosen(*values: Any) -> Any:
                given = iter(values)
                every = [next(given) if c else x for c, x in zip(chosen, args, strict=True)]
                params = equation.primitive.get_bind_params(equation.params)
                return equation.primitive.bind(*every, **params)

            return jax.vjp(of_chosen, *itertools.compress(args, chosen))

        program, (_, pullback) = trace_untyped(self.axes, forward, args)
        residuals, structure = jax.tree.flatten(pullback)

        def trace_backward(cotangents: Values) -> UntypedProgram:
            def backward(*args: Any) -> Any:
                held, given = args[: len(residuals)], args[len(residuals) :]
                return structure.unflatten(held)(list(given))

            return trace_untyped(self.axes, backward, [*residuals, *cotangents])[0]

        return DerivativeRule(program, trace_backward)

    def _evaluate(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        name, params = equation.primitive.name, equation.params
        loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
        if name in loops:
            return loops[name](equation, values)
        if name in _DERIVED:
            return self._derived(equation, values)
        if name in _INLINED:
            return self.run(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], values)
        if name in _REMAT:
            options = {key: params[key] for key in ("policy", "prevent_cse")}
            body = jax.checkpoint(lambda *values: self.run(params["jaxpr"], values), **options)
            return body(*values)
        if name in _SUMMED:
            groups = params["axis_index_groups"]
            return [_SUMMED[name](x, params["axes"], axis_index_groups=groups) for x in values]
        if name == "axis_index":
            return [jax.lax.axis_index(params["axis_name"])]
        if equation.primitive is vary_p:
            return [pvary(values[0], params["axes"])]
        return _bind(equation, values)

    def _scan(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        fixed, carry, slices = split_scan(equation, values)
        types, _ = scan_types(equation, list(map(varying_axes, values)))

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            results = self.run(equation.params["jaxpr"], [*fixed, *carry, *slices])
            return _widen(results[: len(types)], types), results[len(types) :]

        options = {key: equation.params[key] for key in ("length", "reverse", "unroll")}
        carry, stacked = jax.lax.scan(body, _widen(carry, types), slices, **options)
        return [*carry, *stacked]

    def _while(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        tested, fixed, carry = split_while(equation, values)
        types, _ = while_types(equation, list(map(varying_axes, values)))
        # Under `vmap` each element has a condition of its own, and waits for the others.
        together = not equation.params["cond_jaxpr"].out_avals[0].ndim

        def goes_on(carry: list[Any]) -> Any:
            return self.run(equation.params["cond_jaxpr"], [*tested, *carry])[0]

        def body(carry: list[Any]) -> list[Any]:
            after = _widen(self.run(equation.params["body_jaxpr"], [*fixed, *carry]), types)
            if together:
                return after
            return [_choose(goes_on(carry), *pair) for pair in zip(after, carry, strict=True)]

        any_on = goes_on if together else lambda carry: jnp.any(goes_on(carry))
        return jax.lax.while_loop(any_on, body, _widen(carry, types))

    def _cond(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        types, _ = branch_types(equation, list(map(varying_axes, values)))

        def evaluate(branch: Any, *operands: Any) -> list[Any]:
            return _widen(self.run(branch, operands), types)

        branches = [functools.partial(evaluate, each) for each in equation.params["branches"]]
        return jax.lax.switch(values[0], branches, *values[1:])

    def _derived(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        """A function with a derivative rule of its own, which is evaluated with types too."""
        primal = equation.params["call_jaxpr"]
        axes = _joined_types(values)
        # What the function gathers, or takes an index of, varies over more than its arguments.
        axes = axes.union(*follow_types(primal, [axes] * len(values))[0])
        types, _ = follow_types(primal, [axes] * len(values))
        # Constants have no derivative, and some rules refuse to give one: `odeint`'s tables.
        chosen = [_is_float(x) and isinstance(x, Tracer) for x in values]
        rule = self.differentiate(equation, list(map(jax.typeof, values)), chosen)

        def forward(*values: Any) -> tuple[list[Any], list[Any]]:
            results = self.run(rule.forward.jaxpr, [*rule.forward.captured, *values])
            return _widen(results[: len(types)], types), results[len(types) :]

        def backward(residuals: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
            program = rule.trace_backward(cotangents)
            of_chosen = self.run(program.jaxpr, [*program.captured, *residuals, *cotangents])
            found = iter(_widen(of_chosen, [axes] * len(of_chosen)))
            return tuple(next(found) if each else None for each in chosen)

        run = jax.custom_vjp(lambda *values: _widen(self.run(primal, values), types))
        run.defvjp(forward, backward)
        return run(*_widen(values, [axes] * len(values)))


def _bind(equation: core.JaxprEqn, values: list[Any]) -> Values:
    """Computes one operation, its operands brought to one type."""
    name, params = equation.primitive.name, equation.params
    axes = _joined_types(values)
    if "axis_name" in params:
        # A collective: its operand has to vary over the axes that it names.
        named = params["axis_name"]
        axes = axes.union(named if isinstance(named, tuple) else (named,))
    params = equation.primitive.get_bind_params(params)
    try:
        results = equation.primitive.bind(*_widen(values, [axes] * len(values)), **params)
    except (TypeError, ValueError, NotImplementedError) as error:
        where, code = user_line(equation)
        why = f"`{code}` has no types on shards ({first_line(error)})"
        fix = 'mode="auto"; or sk.ShardMapLoss(local, reference), whose local loss casts by itself'
        headline = 'mode="shard_map" does not support this loss.'
        raise StepError.of(headline, f"{name} ({where})", why, fix) from error
    return results if equation.primitive.multiple_results else [results]


def _joined_types(values: Values) -> AxisTypes:
    return frozenset[str]().union(*map(varying_axes, values))


def _widen(values: Values, types: Sequence[AxisTypes]) -> list[Any]:
    return [pvary(x, tuple(sorted(axes))) for x, axes in zip(values, types, strict=True)]


def _choose(on: Any, after: Any, before: Any) -> Any:
    """`after` where `on`, whose dims are the first ones of both; else `before`."""
    return jnp.where(on.reshape(on.shape + (1,) * (after.ndim - on.ndim)), after, before)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
