"""Parts of a config that can be set by a name or a short form: model, strategy and mesh."""

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from .._core.errors import did_you_mean
from ..lm import SIZES, DecoderConfig
from ..mesh import MeshSpec
from ..parallel import Strategy, strategies
from ._pretrained import PretrainedDecoder
from ._values import BadValue

_STRATEGIES: dict[str, Callable[..., Strategy]] = {
    name: getattr(strategies, name) for name in strategies.__all__
}


def parse_size(text: str) -> DecoderConfig:
    """Returns a decoder by the name of its size.

    >>> parse_size("nano").embed_dim
    64
    """
    if text in SIZES:
        return SIZES[text]
    known = ", ".join(SIZES)
    raise BadValue(f"no size {text!r}; known: {known}.{did_you_mean(text, SIZES)}")


def parse_strategy(text: str) -> Strategy:
    """Parses strategies as they are written in Python, with or without parentheses.

    >>> parse_strategy("data | tensor(sequence=True)").kinds
    (Data(axis='data'), Tensor(axis='tensor', sequence=True))
    """
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of which `ast` raises
        raise BadValue(f"expected {_FORM}, got {text!r}.") from None
    return _build_strategy(node)


def parse_mesh(text: str) -> MeshSpec:
    """Parses axes and sizes; `dcn.axis` is the number of slices or hosts that an axis crosses.

    >>> parse_mesh("fsdp=4,tensor=2")
    MeshSpec(fsdp=4, tensor=2)
    >>> parse_mesh("data=2,tensor=4,dcn.data=2").shape
    {'data': 4, 'tensor': 4}
    """
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {axis.strip(): size for axis, _, size in pairs}
    if not all(axis and _is_int(size) for axis, size in sizes.items()):
        raise BadValue(f"expected axis=size,axis=size, got {text!r}.")
    if len(sizes) < len(pairs):
        raise BadValue(f"an axis has two sizes in {text!r}.")
    if "dcn" in sizes:
        raise BadValue("slices are set per axis: dcn.data=2.")
    slices = {axis: int(n) for axis, n in sizes.items() if axis.startswith(_SLICES)}
    ici_sizes: dict[str, Any] = {axis: int(n) for axis, n in sizes.items() if axis not in slices}
    return MeshSpec(dcn={axis.removeprefix(_SLICES): n for axis, n in slices.items()}, **ici_sizes)


_SLICES = "dcn."


def _is_int(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", text.strip()) is not None


_FORM = "strategies such as data|tensor(sequence=True)"


def _build_strategy(node: ast.expr) -> Strategy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _build_strategy(node.left) | _build_strategy(node.right)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.args:
        raise BadValue(f"expected {_FORM}, got {ast.unparse(node)!r}.")
    if call.func.id not in _STRATEGIES:
        hint = did_you_mean(call.func.id, _STRATEGIES)
        raise BadValue(f"no strategy {call.func.id!r}; known: {', '.join(_STRATEGIES)}.{hint}")
    make = _STRATEGIES[call.func.id]
    options = {keyword.arg or "**": _constant_value(keyword.value) for keyword in call.keywords}
    known = inspect.signature(make).parameters
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise BadValue(f"{call.func.id} has options {', '.join(known)}, not {name!r}.{hint}")
    required = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if required:
        example = ", ".join(f"{name}=4" for name in required)
        needs = ", ".join(required)
        raise BadValue(f"{call.func.id} needs {needs}, as in {call.func.id}({example}).")
    return make(**options)


def _constant_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    raise BadValue(f"expected a constant, got {ast.unparse(node)!r}.")


NAMED: dict[Any, Callable[[str], Any]] = {
    DecoderConfig | PretrainedDecoder: parse_size,
    Strategy: parse_strategy,
    MeshSpec: parse_mesh,
}
