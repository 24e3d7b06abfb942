"""How a ratio of two sums over rows is written as `sk.Mean`, in the user's own words."""

import ast
import contextlib

Sides = tuple[ast.expr, ast.expr]


def as_mean(code: str) -> str:
    """`sk.Mean` of the two sides of a division, where they can be read on its line.

    >>> as_mean("return jnp.sum(e * m) / jnp.maximum(jnp.sum(m), 1)")
    'sk.Mean(jnp.sum(e * m), jnp.sum(m))'
    >>> as_mean("loss = 1 - 2 * both.sum() / (a + b)")
    'sk.Mean(1 * (a + b) - 2 * both.sum(), a + b)'
    >>> as_mean("return (e * m).sum() / m.sum() + decay(params)")
    'sk.Mean((e * m).sum(), m.sum()), with what is added to it times the weight'
    >>> as_mean("return jnp.sqrt((e * m).sum() / (m.sum() + eps))")
    'sk.Mean((e * m).sum(), m.sum()) by itself, with nothing made of the mean'
    """
    with contextlib.suppress(SyntaxError):
        for parent in ast.walk(ast.parse(code)):
            for node in ast.iter_child_nodes(parent):
                if sides := _as_quotient(node):
                    total, weight = map(ast.unparse, sides)
                    return f"sk.Mean({total}, {weight}){_of_the_rest(parent)}"
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


def _as_quotient(node: ast.AST) -> Sides | None:
    """Numerator and denominator of a division, with the numbers that stand around it."""
    match node:
        case ast.BinOp(ast.Constant(), ast.Div(), _):
            return None
        case ast.BinOp(total, ast.Div(), weight):
            return total, _unguarded(weight)
        case ast.BinOp(ast.Constant() as number, ast.Add() | ast.Sub() as op, right):
            if sides := _as_quotient(right):
                return ast.BinOp(ast.BinOp(number, ast.Mult(), sides[1]), op, sides[0]), sides[1]
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, ast.Constant() as number):
            if sides := _as_quotient(left):
                return ast.BinOp(sides[0], op, ast.BinOp(number, ast.Mult(), sides[1])), sides[1]
        case ast.BinOp(ast.Constant() as number, ast.Mult() as op, right):
            if sides := _as_quotient(right):
                return ast.BinOp(number, op, sides[0]), sides[1]
        case ast.UnaryOp(ast.USub() as op, operand):
            if sides := _as_quotient(operand):
                return ast.UnaryOp(op, sides[0]), sides[1]
        case ast.Call(ast.Attribute(_, "divide" | "true_divide"), [total, weight]):
            return total, _unguarded(weight)
    return None


def _unguarded(weight: ast.expr) -> ast.expr:
    """A denominator without what keeps it from being zero: `sk.Mean` is 0 where its weight is 0."""
    match weight:
        case ast.Call(ast.Attribute(_, "maximum" | "clip"), [inner, ast.Constant(), *_]):
            return inner
        case ast.Call(ast.Attribute(_, "where"), [_, inner, ast.Constant()]):
            return inner
        case ast.Call(ast.Attribute(_, "maximum"), [ast.Constant(), inner]):
            return inner
        case ast.Call(ast.Attribute(ast.Call() as inner, "clip")):
            return inner
        case ast.BinOp(ast.Call() as inner, ast.Add(), ast.Constant() | ast.Name()):
            return inner
        case ast.BinOp(ast.Constant() | ast.Name(), ast.Add(), ast.Call() as inner):
            return inner
    return weight
