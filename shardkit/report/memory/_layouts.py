"""How each array of a step lies on the mesh, as plain values that a file can hold."""

import dataclasses

from ..._core.tree import short_dtype
from .._program import Placed, Program


@dataclasses.dataclass(frozen=True)
class Layout:
    """One array of the step's input and the part of it that a device holds.

    Attributes:
      part: which part of the input it belongs to: `params`, `opt_state`, `model_state`, `batch` or
        `rest`.
      path: its path in that part: `decoder/mlp/up/kernel`.
      shape: global shape.
      dtype: short name of the element type, `bf16`.
      names: logical axis name of each dim, None where it has none; None if no dim is named.
      spec: mesh axes that split each dim, the slowest first; empty for a dim that is whole.
      shard: shape that one device holds.
      device_bytes: bytes that one device holds.
      meant_whole: the declaration spells that every device holds all of it.
    """

    part: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str | None, ...] | None
    spec: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]
    device_bytes: int
    meant_whole: bool


def layouts(program: Program) -> tuple[Layout, ...]:
    """The layout of every argument of the executable, in its order."""
    return tuple(_layout(placed, program.sizes) for placed in program.leaves)


def _layout(placed: Placed, sizes: dict[str, int]) -> Layout:
    leaf = placed.leaf
    return Layout(
        part=placed.part,
        path=leaf.path,
        shape=leaf.shape,
        dtype=short_dtype(leaf.dtype),
        names=leaf.axes,
        spec=placed.dims(),
        shard=placed.shard(sizes),
        device_bytes=placed.device_bytes(sizes),
        meant_whole=placed.meant_whole,
    )
