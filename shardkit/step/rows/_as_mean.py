"""How a ratio of two sums over rows is written as `sk.Mean`, in the user's own words."""

import ast
import contextlib
from typing import NamedTuple


class _Quotient(NamedTuple):
    """A division, and what leaving out a guard of its denominator changes, in words."""

    total: ast.expr
    weight: ast.expr
    change: str = ""


def as_mean(code: str, guarded: bool = False) -> str:
    """`sk.Mean` of the two sides of a division, where they can be read on its line.

    What keeps the denominator from being zero is left out, as the mean is 0 where its weight is 0.
    If that changes other numbers too, it is said. `guarded`: there is such a guard, here or before.

    >>> as_mean("return jnp.sum(e * m) / (jnp.sum(m) + 1e-8)")
    'sk.Mean(jnp.sum(e * m), jnp.sum(m)), which is 0 where its weight is 0'
    >>> as_mean("return jnp.sum(e * m) / jnp.maximum(jnp.sum(m), 1)")
    'sk.Mean(jnp.sum(e * m), jnp.sum(m)), which is the same where its weight is 0, or 1 or more'
    >>> as_mean("return jnp.sum(e * m) / size", guarded=True)
    'sk.Mean(jnp.sum(e * m), size), size being the sum without its guard'
    >>> as_mean("loss = 1 - 2 * both.sum() / (a + b)")
    'sk.Mean(1 * (a + b) - 2 * both.sum(), a + b)'
    >>> as_mean("return (e * m).sum() / m.sum() + decay(params)")
    'sk.Mean((e * m).sum(), m.sum()), with what is added to it times the weight'
    >>> as_mean("return jnp.sqrt((e * m).sum() / m.sum())")
    'sk.Mean((e * m).sum(), m.sum()) by itself, with nothing made of the mean'
    """
    with contextlib.suppress(SyntaxError):
        for parent in ast.walk(ast.parse(code)):
            for node in ast.iter_child_nodes(parent):
                if quotient := _as_quotient(node):
                    total, weight = map(ast.unparse, quotient[:2])
                    mean = f"sk.Mean({total}, {weight}){_of_the_rest(parent)}"
                    if guarded and not quotient.change and isinstance(quotient.weight, ast.Name):
                        return f"{mean}, {weight} being the sum without its guard"
                    change = quotient.change or (guarded and _AT_ZERO)
                    return mean + (f", which is {change}" if change else "")
    return "sk.Mean(total, weight) with the two sums over rows, undivided"


def _of_the_rest(parent: ast.AST) -> str:
    """What to do with what an outer expression makes of a division."""
    match parent:
        case ast.BinOp(_, ast.Add() | ast.Sub(), _):
            return ", with what is added to it times the weight"
        case ast.Call(ast.Attribute(_, "where")):
            return ""
        case ast.BinOp() | ast.UnaryOp() | ast.Call():
            return " by itself, with nothing made of the mean"
    return ""


def _as_quotient(node: ast.AST) -> _Quotient | None:
    """A division, with the numbers that stand around it."""
    match node:
        case ast.BinOp(ast.Constant(), ast.Div(), _):
            return None
        case ast.BinOp(total, ast.Div(), weight):
            return _Quotient(total, *_unguarded(weight))
        case ast.BinOp(ast.Constant() as number, ast.Add() | ast.Sub() as op, right):
            if inner := _as_quotient(right):
                times = ast.BinOp(number, ast.Mult(), inner.weight)
                return inner._replace(total=ast.BinOp(times, op, inner.total))
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, ast.Constant() as number):
            if inner := _as_quotient(left):
                times = ast.BinOp(number, ast.Mult(), inner.weight)
                return inner._replace(total=ast.BinOp(inner.total, op, times))
        case ast.BinOp(ast.Constant() as number, ast.Mult() as op, right):
            if inner := _as_quotient(right):
                return inner._replace(total=ast.BinOp(number, op, inner.total))
        case ast.UnaryOp(ast.USub() as op, operand):
            if inner := _as_quotient(operand):
                return inner._replace(total=ast.UnaryOp(op, inner.total))
        case ast.Call(ast.Attribute(_, "divide" | "true_divide"), [total, weight]):
            return _Quotient(total, *_unguarded(weight))
    return None


_AT_ZERO = "0 where its weight is 0"
_TINY = 1e-3
_Atom = ast.Constant | ast.Name | ast.Attribute


def _unguarded(weight: ast.expr) -> tuple[ast.expr, str]:
    """A denominator without what keeps it from being zero, and what that changes, in words."""
    match weight:
        case ast.Call(ast.Attribute(owner, "maximum" | "clip"), args, keywords):
            parts = [*args, *(keyword.value for keyword in keywords)]
            if isinstance(owner, ast.Call) or len(parts) == 1:  # a method
                parts = [owner, *parts]
            sums = [part for part in parts if not isinstance(part, _Atom)]
            inner = next(
                iter([*sums, *(x for x in parts if not isinstance(x, ast.Constant))]), weight
            )
            least = next(ast.unparse(part) for part in [*parts, weight] if part is not inner)
            return inner, f"the same where its weight is 0, or {least} or more"
        case ast.Call(ast.Attribute(_, "where"), [_, inner, ast.Constant()]):
            return inner, _AT_ZERO
        case ast.BinOp(
            ast.Call() as inner, ast.Add(), ast.Constant() | ast.Name() as added
        ) | ast.BinOp(ast.Constant() | ast.Name() as added, ast.Add(), ast.Call() as inner):
            match added:
                case ast.Constant(int() | float() as number) if number <= _TINY:
                    return inner, _AT_ZERO
            return inner, f"the same where {ast.unparse(added)} is tiny beside its weight"
    return weight, ""
