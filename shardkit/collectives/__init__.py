"""What the devices of a mesh axis do together, as named bodies under `jax.shard_map`."""

from ._attention import across
from ._blockwise import Part, attend, attend_backward, merge
from ._heads import HeadExchange
from ._pairs import Pairs
from ._ring import Ring
from ._way import Way
from ._zigzag import zigzag_order

__all__ = [
    "HeadExchange",
    "Pairs",
    "Part",
    "Ring",
    "Way",
    "across",
    "attend",
    "attend_backward",
    "merge",
    "zigzag_order",
]
