"""Textbook minima: the fewest bytes one device must send per step for a kind of parallelism.

`n` is the size of the mesh axis; all sizes are bytes on one device, as the device would hold
them without this axis: weights W in the dtype they are gathered in, gradients G in the dtype
they are reduced in, one `[batch, length, embed]` activation A. Sources: Rajbhandari et al. 2020
(ZeRO), Shoeybi et al. 2019 and Korthikanti et al. 2022 (tensor, sequence), Liu et al. 2023
(ring attention), Huang et al. 2019 (pipelines), Lepikhin et al. 2020 (experts).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from ._excess import excess
from ._ledger import Ledger, Row
from ._program import Declared, Placed, base_kind

# A ratio up to this needs no explanation.
_SPARE = 1.1


def data(n: int, gradients: float) -> float:
    """One all-reduce of the gradients per step, whatever the accumulation.

    >>> data(8, 1000)
    1750.0
    """
    return 2 * (n - 1) / n * gradients


def fsdp(n: int, weights: float, gradients: float, gathers: int = 2) -> float:
    """Weights gathered for forward and, unless they are kept, for backward; gradients scattered.

    >>> fsdp(4, 1000, 1000), fsdp(4, 1000, 1000, gathers=1)
    (2250.0, 1500.0)
    """
    return (n - 1) / n * (gathers * weights + gradients)


def zero(n: int, weights: float, gradients: float) -> float:
    """ZeRO-1 and ZeRO-2: gradients reduce-scattered, updated weights gathered.

    >>> zero(4, 1000, 1000)
    1500.0
    """
    return (n - 1) / n * (weights + gradients)


def tensor(n: int, activation: float, layers: int) -> float:
    """Two column-row pairs per layer, each one all-reduce of A forward and one backward.

    With the residual split over length, each all-reduce becomes a gather and a scatter of the
    same bytes.

    >>> tensor(4, 1000, 2)
    12000.0
    """
    return 8 * (n - 1) / n * activation * layers


def context_ring(n: int, keys_and_values: float, layers: int) -> float:
    """Blocks of K and V travel round the ring forward; K, V and their gradients backward.

    Args:
      n: devices in the ring.
      keys_and_values: bytes of K and V of one device's block of the length.
      layers: attention layers.

    >>> context_ring(4, 1000, 1)
    9000.0
    """
    return 3.0 * (n - 1) * keys_and_values * layers


def context_all_to_all(n: int, queries: float, keys_and_values: float, layers: int) -> float:
    """Queries, keys, values and outputs change length for heads and back, in both passes.

    Args:
      n: devices that share a length.
      queries: bytes of the queries of one device's block of the length, or of its outputs.
      keys_and_values: bytes of its K and V.
      layers: attention layers.

    >>> context_all_to_all(4, 1000, 1000, 1)
    4500.0
    """
    return 2 * (n - 1) / n * (2 * queries + keys_and_values) * layers


def pipeline(n: int, activation: float) -> float:
    """One A over each stage boundary, each way; of two stages each sends one way alone.

    Args:
      n: stages.
      activation: bytes of the activations of all micro-batches of one device.

    >>> pipeline(4, 1000), pipeline(2, 1000)
    (2000.0, 1000.0)
    """
    return activation * min(n - 1.0, 2.0)


def expert(n: int, routed: float, layers: int) -> float:
    """Two all-to-alls of the routed tokens forward and two backward, per expert layer.

    >>> expert(4, 1000, 1)
    3000.0
    """
    return 4 * (n - 1) / n * routed * layers


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The textbook minimum of one mesh axis, beside what the program sends.

    Attributes:
      axis: the mesh axis.
      kind: kind of parallelism on it; `data by specs` where the strategy names none and the specs
        tell.
      bytes: fewest wire bytes per device and step.
      wire: what is sent over the axis; see `wire_over`.
      excess: (what, bytes) of what goes beyond the minimum, as far as the rows tell.
    """

    axis: str
    kind: str
    bytes: float
    wire: int
    excess: tuple[tuple[str, int], ...] = ()

    @property
    def ratio(self) -> float | None:
        """How many times the minimum is sent; None where the minimum is nothing."""
        return self.wire / self.bytes if self.bytes else None


def kinds_by_specs(
    sizes: Mapping[str, int], leaves: Sequence[Placed], declared: Declared
) -> dict[str, str]:
    """Kinds of the axes for which a strategy names none, as far as specs alone tell.

    An axis that splits the batch makes gradients of parts of its rows: parameters whole over it
    are data parallelism, with their optimizer state split ZeRO; parameters split over it as well
    are gathered where they are used, which is FSDP. What an axis does that splits no batch
    depends on the model's products, and is not told.
    """

    def over(part: str) -> set[str]:
        return {axis for leaf in leaves if leaf.part == part for axis in leaf.axes()}

    found = {}
    for axis in over("batch") - set(declared.kinds):
        if sizes[axis] > 1:
            updated = "zero" if axis in over("opt_state") else "data"
            found[axis] = "fsdp" if axis in over("params") else updated
    return dict(sorted(found.items()))


def wire_over(ledger: Ledger, axis: str, sizes: Mapping[str, int], leaves: Sequence[Placed]) -> int:
    """Wire bytes over one axis, with the share of collectives that span several.

    What the optimizer's own arithmetic sends is in no textbook and left out.

    A reduction or gather over axes of sizes a and b sends what one over a of V and then one over
    b of V/a send together. The axes that split parameters come first, as for gradients that are
    scattered before they are reduced over the rest.
    """
    share = _shares(axis, sizes, leaves)
    return round(sum(share(row) for row in _counted(ledger, axis)))


def beside(
    ledger: Ledger,
    axis: str,
    sizes: Mapping[str, int],
    leaves: Sequence[Placed],
    declared: Declared,
) -> Minimum | None:
    """The minimum of an axis beside what a program sends over it; None where there is none."""
    least, kind = minimum(axis, sizes, leaves, declared), declared.kinds[axis]
    if least is None:
        return None
    share, rows = _shares(axis, sizes, leaves), _counted(ledger, axis)
    wire = wire_over(ledger, axis, sizes, leaves)
    more = excess(rows, kind, least, declared, share) if wire > _SPARE * least else ()
    return Minimum(axis, base_kind(kind), least, wire, more)


def _counted(ledger: Ledger, axis: str) -> list[Row]:
    return [row for row in ledger.where(axis) if not row.by_optimizer]


def _shares(
    axis: str, sizes: Mapping[str, int], leaves: Sequence[Placed]
) -> Callable[[Row], float]:
    splitting = {name for leaf in leaves if leaf.part == "params" for name in leaf.axes()}
    return functools.partial(_share, axis=axis, sizes=sizes, splitting=splitting)


def _share(row: Row, axis: str, sizes: Mapping[str, int], splitting: set[str]) -> float:
    if row.kind not in ("all-reduce", "all-gather", "reduce-scatter") or not row.whole:
        return row.wire_bytes
    ordered = sorted(row.axes, key=lambda name: name not in splitting)
    before = math.prod(sizes[name] for name in ordered[: ordered.index(axis)])
    own = (sizes[axis] - 1) / sizes[axis] / before
    return row.wire_bytes * own / (1 - 1 / row.group)


def minimum(
    axis: str, sizes: Mapping[str, int], leaves: Sequence[Placed], declared: Declared
) -> float | None:
    """The minimum of an axis by its declared kind, from the parameters' own layout.

    Args:
      axis: a mesh axis with a kind in `declared.kinds`.
      sizes: mesh axis → size.
      leaves: the arguments of the step.
      declared: kinds and dtypes; for tensor parallelism also the activation's bytes and the
        number of layers, for context parallelism that and the constraints on q and k.

    Returns:
      Bytes per device and step; None for kinds that parameters and `declared` do not determine.
    """
    kind, n = base_kind(declared.kinds[axis]), sizes[axis]
    params = [leaf for leaf in leaves if leaf.part == "params"]
    split = [leaf for leaf in params if axis in leaf.axes()]
    whole = [leaf for leaf in params if axis not in leaf.axes()]
    replicated = data(n, _bytes(whole, sizes, declared.reduce_dtype))
    if kind == "data":
        return replicated
    if kind == "zero":
        sent = _bytes(whole, sizes, declared.compute_dtype)
        return zero(n, sent, _bytes(whole, sizes, declared.reduce_dtype))
    if kind == "fsdp":
        weights = n * _bytes(split, sizes, declared.compute_dtype)
        gradients = n * _bytes(split, sizes, declared.reduce_dtype)
        kept = declared.kinds[axis] == "fsdp+kept"
        return replicated + fsdp(n, weights, gradients, gathers=1 if kept else 2)
    if kind == "context":
        attention = _context(n, sizes, declared)
        return None if attention is None else replicated + attention
    if declared.activation_bytes is None:
        return None
    if kind == "expert" and declared.layers is not None and declared.choices is not None:
        routed = declared.activation_bytes * declared.choices
        return replicated + expert(n, routed, declared.layers // _stages(sizes, declared))
    if kind == "pipeline":
        # Micro-batches together are the rows of one device, so their number does not matter.
        return replicated + pipeline(n, declared.activation_bytes)
    if kind == "tensor" and declared.layers is not None:
        return tensor(n, declared.activation_bytes, declared.layers // _stages(sizes, declared))
    return None


def _context(n: int, sizes: Mapping[str, int], declared: Declared) -> float | None:
    """What attention sends over an axis of size n that splits the length."""
    queries, keys = (_activation(name, sizes, declared) for name in ("heads", "kv_heads"))
    if queries is None or keys is None or declared.layers is None:
        return None
    layers = declared.layers // _stages(sizes, declared)
    if "context+all_to_all" in declared.kinds.values():
        return context_all_to_all(n, queries, 2 * keys, layers)
    return context_ring(n, 2 * keys, layers)


def _activation(name: str, sizes: Mapping[str, int], declared: Declared) -> float | None:
    """Bytes on one device, per step, of the activation that has a length and this dim."""
    for placed in declared.constraints:
        if {"length", name} <= set(placed.leaf.axes or ()):
            return placed.device_bytes(sizes) * _times(sizes, declared)
    return None


def _times(sizes: Mapping[str, int], declared: Declared) -> float:
    """How many activations as constraints show them a device computes in a step.

    Inside a pipeline they show one device's rows of one micro-batch.
    """
    work = {"batch", "length", "embed"}
    shown = [one for one in declared.constraints if set(one.leaf.axes or ()) == work]
    if _stages(sizes, declared) == 1 or not shown or declared.activation_bytes is None:
        return declared.accumulate
    return declared.activation_bytes / shown[0].device_bytes(sizes)


def _stages(sizes: Mapping[str, int], declared: Declared) -> int:
    """Parts that a pipeline cuts the layers into, of which a device works on one."""
    of_pipelines = (axis for axis, kind in declared.kinds.items() if base_kind(kind) == "pipeline")
    return math.prod(sizes.get(axis, 1) for axis in of_pipelines)


def _bytes(leaves: Sequence[Placed], sizes: Mapping[str, int], dtype: str | None) -> int:
    """Bytes of one device's shards, if they were of `dtype` (None: their own)."""
    return sum(leaf.device_bytes(sizes, dtype) for leaf in leaves)
