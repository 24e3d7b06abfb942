"""Computes a loss with quantized weights, which become numbers only where they are used.

Dequantizing all weights before the loss would be simpler, but would hold a whole model of floats.
So the loss is traced, and the trace is evaluated with codes in the place of weights: a loop over
layers takes the codes of one layer in each turn, and an operation that takes a weight dequantizes
it under `jax.checkpoint`, so that the backward pass keeps codes and dequantizes them again. Casts
and what only moves elements wait for that operation, and a weight that is stored in shards is
gathered as codes:

    W [layers, embed, mlp]    scan over layers   W[i]                x W[i].astype(bf16)
    codes, scales             →                  codes[i], scales[i] → gather, floats, cast, product
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from .._core.equations import bind, count_scan_operands, evaluate, inlined_program
from .._core.tracing import record_fact
from .._core.types import PyTree
from ..nn._deferred import OpenCall, leaving_open, open_call_p
from ..nn._overridable import gather_stored
from ..nn._remat import NEVER_SAVED
from ._blocks import QuantizedLeaf
from ._open_calls import PRODUCT, WeightForm, call_again

_REMAT = ("checkpoint", "remat2")
# A cast is the same operation on one layer as on all of them; what moves elements is not.
_MARKS = ("shardkit_record", "shardkit_use_param")
_CASTS = ("convert_element_type", "reduce_precision", "copy", *_MARKS)
_MOVES = (*_CASTS, "transpose", "reshape", "squeeze", "slice", "broadcast_in_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized weight in a traced loss, or one layer of it."""

    codes: jax.Array  # see `QuantizedLeaf`
    scales: jax.Array  # the same
    of: QuantizedLeaf = dataclasses.field(metadata={"static": True})  # the weight
    # operations of the loss on the dequantized weight that wait until it is used
    moves: tuple[core.JaxprEqn, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def is_cast(self) -> bool:
        """Whether nothing but casts waits, so that codes have the dims of the traced weight."""
        return all(x.primitive.name in _CASTS for x in self.moves)

    @property
    def has_layers(self) -> bool:
        """Whether a loop may take one layer in each turn."""
        return self.codes.ndim > 1 and self.is_cast

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Codes":
        """The same weight, with a function of codes and scales that moves whole blocks."""
        return dataclasses.replace(self, codes=function(self.codes), scales=function(self.scales))


def call_with_codes(loss: Callable[..., PyTree], args: Sequence[Any], weights: PyTree) -> PyTree:
    """Calls a loss with `weights`, the parameters with `Codes` in place of each quantized one.

    The first of its arguments, the parameters, may be abstract.
    """
    with leaving_open():
        traced, shapes = jax.make_jaxpr(loss, return_shape=True)(*args)
    flat = [*jax.tree.leaves(weights, is_leaf=_is_codes), *jax.tree.leaves(args[1:])]
    return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(traced, flat))


def _evaluate(program: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a program; its results are arrays."""
    return list(map(_dequantize, evaluate(program, args, _compute)))


def _compute(index: int, equation: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if equation.primitive is open_call_p:
        return _call_open(params["call"], values)
    if not any(map(_is_codes, values)):
        return _bind(equation, *values)
    if name in _MOVES and _is_codes(values[0]) and len(values) == 1:
        return [dataclasses.replace(values[0], moves=(*values[0].moves, equation))]
    if name == "all_gather" and values[0].is_cast:  # of `mode="shard_map"`
        return [values[0].map(lambda x: bind(equation, [x])[0])]
    if (inner := inlined_program(equation)) is not None:
        return _evaluate(inner, values)
    if name in _REMAT:
        options = {option: params[option] for option in ("policy", "prevent_cse")}
        return jax.checkpoint(functools.partial(_evaluate, params["jaxpr"]), **options)(values)
    if name == "scan":
        return _scan(equation, values)
    if name == "cond":
        branches = [functools.partial(_evaluate, branch) for branch in params["branches"]]
        return jax.lax.switch(values[0], branches, values[1:])
    return jax.checkpoint(functools.partial(_bind, equation))(*values)


def _scan(equation: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    fixed, carried = count_scan_operands(equation)
    start = list(map(_dequantize, values[fixed : fixed + carried]))
    slices = values[fixed + carried :]
    layers = [_dequantize(x) if _is_codes(x) and not x.has_layers else x for x in slices]

    def body(carry: list[Any], each: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluate(equation.params["jaxpr"], [*values[:fixed], *carry, *each])
        return results[:carried], results[carried:]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(body, start, layers, **options)
    return [*carry, *stacked]


def _call_open(call: OpenCall, values: list[Any]) -> Sequence[Any]:
    if call.name == PRODUCT:
        x, w = values[-2:]
        if not _is_codes(w):
            return call.call(x, w)
        return jax.checkpoint(lambda x, w: call.call(x, _dequantize(w)))(x, w)
    operands = [_dequantize(x) if _is_codes(x) and not x.has_layers else x for x in values]
    form = WeightForm(_is_codes, functools.partial(jax.eval_shape, _dequantize))
    return call_again(call, operands, form, lambda program, args, _: _evaluate(program, args))


def _bind(equation: core.JaxprEqn, *values: Any) -> Sequence[Any]:
    return bind(equation, list(map(_dequantize, values)))


def _is_codes(x: Any) -> bool:
    return isinstance(x, Codes)


def _dequantize(x: Any) -> Any:
    if not _is_codes(x):
        return x
    weight = _to_floats(x.map(functools.partial(gather_stored, x.of.leaf.path)))
    for move in x.moves:
        (weight,) = _bind(move, weight)
    return weight


@jax.custom_jvp
def _to_floats(x: Codes) -> jax.Array:
    """One operation of the trace, which the policy of a `jax.checkpoint` around it can tell."""
    return record_fact(x.of.dequantize(x.codes, x.scales), NEVER_SAVED)


@_to_floats.defjvp
def _to_floats_jvp(primals: tuple[Codes], tangents: tuple[Codes]) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda x: x.of.dequantize(x.codes, x.scales), primals, tangents)
