"""What attention over a split length computes, sends and holds, by the formulae of `context`.

Dims: B rows, T queries, S keys, N heads, K key heads, H head width.
"""

import dataclasses
import math
from collections.abc import Sequence

from ._region_probe import ATTENTION_BACKWARD
from ._symbolic_sharding import SymbolicBytes, SymbolicSharding, add_bytes, symbolic_bytes

_TILE = 512  # the widest tile of logits, as attention across devices cuts them


@dataclasses.dataclass(frozen=True)
class AttentionCosts:
    """One `sk.nn.attention`, forward or backward.

    Attributes:
      sent: kind, mesh axes and payload of its exchanges.
      flops: of its products, on all devices.
      moved: bytes written and read, but for q, k and v.
      held: bytes that it holds while it runs.
    """

    sent: tuple[tuple[str, frozenset[str], SymbolicBytes], ...]
    flops: float
    moved: SymbolicBytes
    held: SymbolicBytes


def attention_costs(
    name: str,
    causal: bool,
    way: str,
    shapes: Sequence[tuple[int, ...]],
    laid: Sequence[SymbolicSharding],
    width: float,
) -> AttentionCosts:
    """Costs an attention whose operands begin with q, k and v.

    Args:
      name: of the operation, forward or backward.
      causal: whether half of the logits are hidden.
      way: `"ring"` or `"all_to_all"`.
      shapes: of q and k.
      laid: layouts of q and k.
      width: bytes of an element.
    """
    (q_BTNH, k_BSKH), (q, k) = shapes, laid
    backward, axes = name == ATTENTION_BACKWARD, frozenset(q.dims[1])
    rows, queries, heads, head = q_BTNH
    keys = k_BSKH[1]
    tile = min(_TILE, queries)
    seen = min(1.0, 0.5 + tile / (2 * queries)) if causal else 1.0
    logits = rows * heads * queries * keys * seen
    # Forward a product writes logits in f32 and another reads them narrow; backward there are
    # two of the first kind and three of the second.
    moved = {q.axes: logits * (8 + 3 * width if backward else 4 + width)}
    held: SymbolicBytes = {}
    tiles = rows * heads * tile * min(_TILE, keys) * 4.0 * (3 if backward else 1)
    add_bytes(held, {q.axes - axes: tiles})
    add_bytes(held, symbolic_bytes(q_BTNH, 4, q))  # what is added up is in f32
    add_bytes(held, symbolic_bytes(k_BSKH, 4, k), 4.0 if backward else 0.0)
    add_bytes(held, symbolic_bytes(k_BSKH, width, k), 4.0)  # one block worked on, one on its way
    sent = _exchanges(backward, causal, way, (q_BTNH, k_BSKH), (q, k), width) if axes else ()
    return AttentionCosts(sent, (10.0 if backward else 4.0) * logits * head, moved, held)


def _exchanges(
    backward: bool,
    causal: bool,
    way: str,
    shapes: Sequence[tuple[int, ...]],
    laid: Sequence[SymbolicSharding],
    width: float,
) -> tuple[tuple[str, frozenset[str], SymbolicBytes], ...]:
    axes = frozenset(laid[0].dims[1])
    own: SymbolicBytes = {}  # q, k, v and what comes out, or their gradients
    for shape, one in zip(shapes, laid, strict=True):
        add_bytes(own, symbolic_bytes(shape, width, one), 2.0)
    if way == "all_to_all":
        return (("all-to-all", axes, own),)
    # The n − 1 blocks that a device sends on are what a gather of all of them sends.
    widths = (width, 4.0) if backward else (width,)  # backward their gradients too, in f32
    whole, number = laid[1].axes - axes, 2.0 * math.prod(shapes[1])
    ring = tuple(("all-gather", axes, {whole: number * w}) for w in widths)
    swapped = {held: size / 2 for held, size in own.items()}
    return (*ring, ("swap", axes, swapped)) if causal else ring
