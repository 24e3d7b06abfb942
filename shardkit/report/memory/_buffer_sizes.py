"""Bytes that a value of a compiled program takes in a device's main memory.

A layout prints more than a shape: on TPU an array lies in tiles of 8 × 128 that its last dims are
padded to, and small ones may lie in a core's own memory, `S(1)`, which is no part of the
device's.
"""

import dataclasses
import math
import re

from ..hlo._hlo import Shape, dtype_bits, shapes_of, split_commas

_COMMENT = re.compile(r"/\*.*?\*/")
_ORDER = re.compile(r"\{([\d,]*)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Sized:
    """An array with its bytes in main memory; 0 where it lies elsewhere."""

    shape: Shape
    bytes: int


Type = Sized | list["Type"]


def sized(text: str, platform: str) -> Type:
    """Reads a result type: an array, or a list for a tuple.

    >>> sized("f32[3,100]{1,0:T(8,128)}", "tpu").bytes == 4 * 8 * 128
    True
    >>> [one.bytes for one in sized("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0})", "tpu")]
    [0, 8]
    """
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return [sized(piece, platform) for piece in split_commas(text[1:-1])]
    (shape,) = shapes_of(text.partition("{")[0])
    return Sized(shape, _bytes(shape, text.partition("]")[2], platform))


def _bytes(shape: Shape, layout: str, platform: str) -> int:
    space = _SPACE.search(layout)
    # On GPU space 1 is what collectives use of the same memory.
    if space and not (platform == "gpu" and space[1] == "1"):
        return 0
    tile, order = _TILE.search(layout), _ORDER.search(layout)
    if tile is None or order is None:
        return shape.nbytes
    ways = [int(n) for n in tile[1].split(",")]
    # The layout names dims from the fastest to the slowest.
    dims = [shape.dims[int(n)] for n in reversed(order[1].split(",")) if n]
    dims = [1] * (len(ways) - len(dims)) + dims
    at = len(dims) - len(ways)
    padded = dims[:at] + [-(-n // k) * k for n, k in zip(dims[at:], ways, strict=True)]
    return -(-math.prod(padded) * dtype_bits(shape.dtype) // 8)
