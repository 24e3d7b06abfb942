"""What attention over a split length computes, sends and holds, by the formulae of `context`.

Dims: B rows, T queries, S keys, N heads, K key heads, H head width.
"""

import dataclasses
import math
from collections.abc import Sequence

from ._region_probe import ATTENTION_BACKWARD
from ._symbolic_sharding import SymbolicBytes, SymbolicSharding, add_bytes, symbolic_bytes

_TILE = 512  # the widest tile of logits that attention across devices computes at a time


@dataclasses.dataclass(frozen=True)
class AttentionCosts:
    """Costs of one `sk.nn.attention`, forward or backward."""

    # kind, mesh axes and payload of each
    exchanges: tuple[tuple[str, frozenset[str], SymbolicBytes], ...]
    flops: float  # of its products, on all devices
    bytes_moved: SymbolicBytes  # bytes written and read, without q, k and v
    scratch: SymbolicBytes  # bytes that it holds while it runs


def attention_costs(
    name: str,
    *,
    causal: bool,
    method: str,
    shapes: Sequence[tuple[int, ...]],
    shardings: Sequence[SymbolicSharding],
    width: float,
) -> AttentionCosts:
    """Costs the `method` of an attention; `shapes` and `shardings` are those of q and k.

    `name` says whether it is forward or backward; `width` is bytes of an element. Of causal
    attention half of the logits are hidden.
    """
    (q_BTNH, k_BSKH), (q, k) = shapes, shardings
    backward, axes = name == ATTENTION_BACKWARD, frozenset(q.dims[1])
    rows, queries, heads, head = q_BTNH
    keys = k_BSKH[1]
    tile = min(_TILE, queries)
    # Of a causal mask half is computed, and half of the tiles on the diagonal more:
    # 2048 queries in tiles of 512 compute 1/2 + 512 / (2 · 2048) = 62.5 % of all logits.
    computed = min(1.0, 0.5 + tile / (2 * queries)) if causal else 1.0
    logits = rows * heads * queries * keys * computed
    # Forward a product writes logits in f32 and another reads them narrow; backward there are
    # two of the first kind and three of the second.
    moved = {q.axes: logits * (8 + 3 * width if backward else 4 + width)}
    scratch: SymbolicBytes = {}
    tiles = rows * heads * tile * min(_TILE, keys) * 4.0 * (3 if backward else 1)
    add_bytes(scratch, {q.axes - axes: tiles})
    add_bytes(scratch, symbolic_bytes(q_BTNH, 4, q))  # the output accumulates in f32
    add_bytes(scratch, symbolic_bytes(k_BSKH, 4, k), 4.0 if backward else 0.0)
    # k and v, each once for the block that is computed and once for the block on its way
    add_bytes(scratch, symbolic_bytes(k_BSKH, width, k), 4.0)
    sizes: list[SymbolicBytes] = [
        symbolic_bytes(q_BTNH, width, q),
        symbolic_bytes(k_BSKH, width, k),
    ]
    exchanges: tuple[tuple[str, frozenset[str], SymbolicBytes], ...] = ()
    if axes and method == "all_to_all":
        exchanges = (("all-to-all", axes, _sum_twice(sizes)),)
    elif axes:
        # The n − 1 blocks that a device sends on are what a gather of all of them sends;
        # backward their gradients travel too, in f32.
        gathered, elements = k.axes - axes, 2.0 * math.prod(k_BSKH)
        widths = (width, 4.0) if backward else (width,)
        exchanges = tuple(("all-gather", axes, {gathered: elements * w}) for w in widths)
        if causal:  # zigzag: each device swaps half of its rows with one partner
            swapped = {split: size / 2 for split, size in _sum_twice(sizes).items()}
            exchanges = (*exchanges, ("swap", axes, swapped))
    return AttentionCosts(exchanges, (10.0 if backward else 4.0) * logits * head, moved, scratch)


def _sum_twice(sizes: Sequence[SymbolicBytes]) -> SymbolicBytes:
    """Bytes of q, k, v and the output, or of their gradients: those of q and of k, twice each."""
    total: SymbolicBytes = {}
    for size in sizes:
        add_bytes(total, size, 2.0)
    return total
