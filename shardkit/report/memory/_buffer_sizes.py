"""Bytes that a value of a compiled program takes in a device's main memory.

The printed type has a layout besides the shape: on TPU the last dims are padded to tiles, such as
8 × 128, and small arrays can be in a core's own memory, `S(1)`, outside of main memory.
"""

import dataclasses
import math
import re

from ..hlo._hlo import Shape, dtype_bits, parse_shapes, split_commas

_COMMENT = re.compile(r"/\*.*?\*/")
_ORDER = re.compile(r"\{([\d,]*)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class SizedArray:
    """An array with its bytes in main memory; 0 if it is in another memory."""

    shape: Shape
    bytes: int


SizedType = SizedArray | list["SizedType"]


def parse_sized_type(text: str, platform: str) -> SizedType:
    """Reads a result type: an array, or a list for a tuple.

    >>> parse_sized_type("f32[3,100]{1,0:T(8,128)}", "tpu").bytes == 4 * 8 * 128
    True
    >>> text = "(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0})"
    >>> [array.bytes for array in parse_sized_type(text, "tpu")]
    [0, 8]
    """
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return [parse_sized_type(piece, platform) for piece in split_commas(text[1:-1])]
    (shape,) = parse_shapes(text.partition("{")[0])
    return SizedArray(shape, _padded_bytes(shape, text.partition("]")[2], platform))


def _padded_bytes(shape: Shape, layout: str, platform: str) -> int:
    space = _SPACE.search(layout)
    # On GPU space 1 is the part of main memory that collectives use.
    if space and not (platform == "gpu" and space[1] == "1"):
        return 0
    tile, order = _TILE.search(layout), _ORDER.search(layout)
    if tile is None or order is None:
        return shape.nbytes
    ways = [int(n) for n in tile[1].split(",")]
    # The layout lists dims from the fastest to the slowest.
    dims = [shape.dims[int(n)] for n in reversed(order[1].split(",")) if n]
    dims = [1] * (len(ways) - len(dims)) + dims
    at = len(dims) - len(ways)
    padded = dims[:at] + [-(-n // k) * k for n, k in zip(dims[at:], ways, strict=True)]
    return -(-math.prod(padded) * dtype_bits(shape.dtype) // 8)
