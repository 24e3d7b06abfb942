"""Memory and time of many meshes at once, from one walk."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.tree import short_dtype
from .._core.types import Accumulate
from ..hardware import Chip
from ..mesh import Target
from ..parallel import axes_splitting, gradient_shard_axes
from ._costs import HEADS, LENGTH, PARTS, Sent, Work
from ._network import WIRE, Network
from ._symbolic_sharding import MICRO, Terms, product
from ._trace import Walked


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is taken for granted of the devices.

    Attributes:
      network: links and chip.
      dtype: of the products.
      overlap: share of communication that computing hides.
    """

    network: Network
    dtype: str
    overlap: float = 0.0

    @classmethod
    def of(
        cls, target: Target, compute: Any, overlap: float = 0.0, more: Iterable[Chip] = ()
    ) -> "Machine":
        """The devices of a target that compute in a dtype; `more` are chips of a user's own."""
        return cls(Network.of(target, more), short_dtype(jnp.dtype(compute)), overlap)

    @property
    def efficiency(self) -> float:
        """Share of the peak that products in whole tiles are taken to reach."""
        return EFFICIENCY.get(self.network.chip.kind, 1.0)

    @property
    def memory_efficiency(self) -> float:
        """Share of the memory's rate that its traffic is taken to reach."""
        return MEMORY_EFFICIENCY.get(self.network.chip.kind, 1.0)

    @property
    def width(self) -> int:
        """Bytes of an element of what is computed with."""
        return 2 if self.dtype in ("bf16", "f16") else 4

    @property
    def peak(self) -> float:
        """FLOP/s of products."""
        flops = self.network.chip.flops
        return flops.get(self.dtype, flops["bf16"])


MEMORY_EFFICIENCY = {"tpu": 0.6}
EFFICIENCY = {"tpu": 0.7}
"""By kind of chip, rounded: what the TPU compiler's own estimates of an update (memory) and of the
forward products of an MLP (products, whole tiles) leave of the peaks, in a compiled step of a
decoder 1024 wide over `data=8` of a v5p. Nothing is set for other kinds, which count with 1."""
_SMALL = 2**16
"""Bytes below which compilers combine collectives over the same axes into one."""

Case = tuple[Mapping[str, int], Accumulate]


@dataclasses.dataclass(frozen=True)
class Estimates:
    """One array entry per case.

    Attributes:
      temp: bytes alive at once beside the arguments.
      compute: seconds of products, each at the peak or at the memory's speed.
      memory: seconds of other writes to memory.
      wire: mesh axes → bytes one device sends per step.
      communication: mesh axes → seconds on the links.
    """

    temp: np.ndarray
    compute: np.ndarray
    memory: np.ndarray
    wire: Mapping[tuple[str, ...], np.ndarray]
    communication: Mapping[tuple[str, ...], np.ndarray]

    def seconds(self, overlap: float) -> np.ndarray:
        """Seconds of a step."""
        exposed = sum(self.communication.values(), np.zeros_like(self.compute))
        return self.compute + self.memory + (1 - overlap) * exposed


def estimate(
    walked: Walked,
    cases: Sequence[Case],
    machine: Machine,
    batch_scale: float = 1.0,
    lanes: Sequence[float] = (),
) -> Estimates:
    """Evaluates a walk on every mesh with its accumulation, all of them at once.

    Args:
      walked: what one step's loss and gradient do.
      cases: `{axis: size}` and micro-batches, each.
      machine: the devices.
      batch_scale: as if the batch had so many times its rows.
      lanes: bytes of each case's gradients in f32, unreduced over rows.
    """
    parts = Parts(cases, batch_scale)
    k = parts.micro_batches
    at_once = parts.summed_at_once() if lanes else np.zeros(len(cases), bool)
    compute, memory = each_work(walked, parts, machine)
    wire: dict[tuple[str, ...], np.ndarray] = {}
    spent: dict[tuple[str, ...], np.ndarray] = {}
    for one, sent, seconds in each_sent(walked, parts, machine):
        name = tuple(axis for axis in cases[0][0] if axis in one.axes)
        # A lane holds whole rows, so what is summed over their length cannot wait.
        waits = one.gradient and LENGTH not in one.axes
        repeated = np.where(at_once, 0.0, np.where(parts.once, 1.0, k)) if waits else k
        repeated = one.trips * repeated * parts.of([one.loops])[0]
        wire[name] = wire.get(name, 0.0) + repeated * sent
        spent[name] = spent.get(name, 0.0) + repeated * seconds
    if at_once.any():
        name = tuple(axis for axis in cases[0][0] if axis in gradient_shard_axes())
        n = product(name, parts.sizes)
        sent = np.array(lanes) * machine.width / 4 * 2 * (n - 1) / n
        hops = 2 * (n - 1) * machine.network.chip.latency
        seconds = sent / parts.rate(frozenset(name), machine.network) + hops
        wire[name] = wire.get(name, 0.0) + np.where(at_once, sent, 0.0)
        spent[name] = spent.get(name, 0.0) + np.where(at_once, seconds, 0.0)
    return Estimates(
        temp=parts.bytes(walked.points).max(axis=0),
        compute=k * compute.sum(axis=0),
        memory=k * memory.sum(axis=0),
        wire=wire,
        communication=spent,
    )


def each_work(walked: Walked, parts: "Parts", machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of products and of other writes of one micro-batch: f64[parts, cases] each."""
    work = walked.walk.work
    times = np.array([w.trips for w in work])[:, None] * parts.of(w.loops for w in work)
    moved = parts.bytes([w.moved for w in work]) / machine.network.chip.memory_bandwidth
    flops = np.array([w.flops for w in work])[:, None] * parts.of(w.split for w in work)
    filled = np.array([_filled(w, parts, machine.network.chip.tile) for w in work])
    products = flops * filled / machine.peak / machine.efficiency
    each = np.maximum(products, moved / machine.memory_efficiency) * times
    product = np.array([bool(w.flops) for w in work])[:, None]
    found = np.zeros((2, len(PARTS), each.shape[1]))
    where = np.array([w.part for w in work])
    np.add.at(found[0], where, np.where(product, each, 0.0))
    np.add.at(found[1], where, np.where(product, 0.0, each))
    return found[0], found[1]


def _filled(one: Work, parts: "Parts", tile: int) -> np.ndarray:
    """FLOPs that whole tiles take for each one of a product: f64[cases]."""
    if not one.dims or tile == 1:
        return np.ones(len(parts.cases))
    sizes = np.array([n for n, _ in one.dims])[:, None] * parts.of(axes for _, axes in one.dims)
    rows, columns, summed = np.ceil(sizes / tile) * tile / sizes
    # One operand stays in the unit, by its summed dim and its own; the other streams past it.
    return summed * np.minimum(rows, columns)


def each_sent(
    walked: Walked, parts: "Parts", machine: Machine
) -> Iterator[tuple[Sent, np.ndarray, np.ndarray]]:
    """Every collective with its wire bytes and seconds, of one execution: f64[cases] each."""
    combined: dict[tuple[frozenset[str], float], np.ndarray] = {}
    for one in walked.walk.sent:
        sent, hop = _sent(one, parts, machine)
        small = sent < _SMALL
        joins = combined.setdefault((one.axes, one.trips), np.zeros_like(small))
        seconds = sent / parts.rate(one.axes, machine.network) + np.where(small & joins, 0.0, hop)
        joins |= small
        yield one, sent, seconds


class Parts:
    """Into how many parts groups of axes split a value, for every case."""

    def __init__(self, cases: Sequence[Case], batch_scale: float) -> None:
        self.cases = cases
        self.micro_batches = np.array([float(how.micro_batches) for _, how in cases])
        self.once = np.array([how.reduce == "end" for _, how in cases])
        self.sizes = {a: np.array([float(m[a]) for m, _ in cases]) for a in cases[0][0]}
        self.sizes[MICRO] = self.micro_batches / batch_scale
        self.rates: dict[frozenset[str], np.ndarray] = {}

    def summed_at_once(self) -> np.ndarray:
        """Where one all-reduce over all rows' axes sums whole lanes of gradients: bool[cases].

        A lane's gradients are whole over the axes of rows, so that a compiler has nothing to
        scatter them by but a slice behind the sum; with `fsdp` alone it does, with `data` not.
        """
        known = {*gradient_shard_axes(), HEADS, MICRO}
        others = product([axis for axis in self.sizes if axis not in known], self.sizes)
        whole = {*gradient_shard_axes()} - {*axes_splitting("rows", "weights")}
        data = product([axis for axis in self.sizes if axis in whole], self.sizes)
        return self.once & (self.micro_batches > 1) & (data > 1) & (others == 1)

    def of(self, groups: Iterable[frozenset[str]]) -> np.ndarray:
        """1 / parts of each group: f64[groups, cases]."""
        listed = list(groups)
        found = {axes: 1 / product(axes, self.sizes) for axes in set(listed)}
        return np.array([found[axes] for axes in listed])

    def bytes(self, of: Sequence[Terms]) -> np.ndarray:
        """Bytes on one device: f64[len(of), cases]."""
        groups = sorted({axes for one in of for axes in one}, key=sorted)
        held = np.array([[one.get(axes, 0.0) for axes in groups] for one in of])
        return held @ self.of(groups)

    def rate(self, axes: frozenset[str], network: Network) -> np.ndarray:
        """Bytes/s over a group of axes: f64[cases]."""
        if axes not in self.rates:
            meshes = {tuple(mesh.values()): mesh for mesh, _ in self.cases}
            rates = network.rates([*meshes.values()], axes)
            by_mesh = dict(zip(meshes, rates, strict=True))
            self.rates[axes] = np.array([by_mesh[tuple(mesh.values())] for mesh, _ in self.cases])
        return self.rates[axes]


def _sent(one: Sent, parts: Parts, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Wire bytes and seconds of latency of one execution, as `inspect`'s links have them."""
    n = product(one.axes, parts.sizes)
    share = np.where(n > 1, 1.0, 0.0) if one.kind == "swap" else WIRE[one.kind] * (n - 1) / n
    if one.gradient and one.kind == "reduce-scatter" and one.trips > 1 and machine.network.torus:
        # TPU compilers make it a chain of permutes behind its product, and the last goes home.
        share = np.where(n > 2, 1.0, share)
    sent = share * parts.bytes([one.payload])[0]
    hops = np.minimum(n - 1, 1) if one.kind == "swap" else WIRE[one.kind] * (n - 1)
    return sent, hops * machine.network.chip.latency
