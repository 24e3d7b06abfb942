"""Memory and time of many meshes at once, from the symbolic costs of one step."""

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
from ._costs import HEADS, LENGTH, PHASES, Collective, Compute
from ._network import WIRE, Network
from ._symbolic_sharding import MICRO, SymbolicBytes, count_shards
from ._trace import StepCosts


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices, as estimates assume them."""

    network: Network  # links and chip
    dtype: str  # of the products
    overlap: float = 0.0  # share of communication that compute hides

    @classmethod
    def of(
        cls, target: Target, compute: Any, overlap: float = 0.0, chips: Iterable[Chip] = ()
    ) -> "Machine":
        """The devices of a target that compute in a dtype; `chips` are a user's own."""
        return cls(Network.of(target, chips), short_dtype(jnp.dtype(compute)), overlap)

    @property
    def efficiency(self) -> float:
        """Share of the peak that products in whole tiles reach."""
        return EFFICIENCY.get(self.network.chip.kind, 1.0)

    @property
    def memory_efficiency(self) -> float:
        """Share of the memory bandwidth that traffic reaches."""
        return MEMORY_EFFICIENCY.get(self.network.chip.kind, 1.0)

    @property
    def width(self) -> int:
        """Bytes of an element in the dtype of the products."""
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
decoder 1024 wide over `data=8` of a v5p. Other kinds of chip count with 1."""
_SMALL = 2**16
"""Bytes below which compilers combine collectives over the same axes into one."""

MeshBatching = tuple[Mapping[str, int], Accumulate]
"""Size of each mesh axis, and micro-batches."""


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Estimates of many cases: f64[cases] each."""

    temp: np.ndarray  # peak bytes alive, without the arguments
    compute: np.ndarray  # seconds of products, each at the peak or at the memory's speed
    memory: np.ndarray  # seconds of other memory traffic
    wire: Mapping[tuple[str, ...], np.ndarray]  # mesh axes → bytes one device sends per step
    communication: Mapping[tuple[str, ...], np.ndarray]  # mesh axes → seconds on the links

    def seconds(self, overlap: float) -> np.ndarray:
        """Seconds of a step."""
        exposed = sum(self.communication.values(), np.zeros_like(self.compute))
        return self.compute + self.memory + (1 - overlap) * exposed


def estimate(
    costs: StepCosts,
    cases: Sequence[MeshBatching],
    machine: Machine,
    *,
    batch_scale: float = 1.0,
    unreduced: Sequence[float] = (),
) -> Estimates:
    """Evaluates the costs of a step on every mesh with its accumulation, all of them at once.

    They are as if the batch had `batch_scale` times its rows. `unreduced` are bytes of each case's
    gradients in f32, unreduced over rows.
    """
    shards = ShardCounts(cases, batch_scale)
    k = shards.micro_batches
    at_end = shards.all_reduces_at_end() if unreduced else np.zeros(len(cases), bool)
    compute, memory = compute_seconds(costs, shards, machine)
    wire: dict[tuple[str, ...], np.ndarray] = {}
    links: dict[tuple[str, ...], np.ndarray] = {}
    for collective, sent, seconds in cost_collectives(costs, shards, machine):
        name = tuple(axis for axis in cases[0][0] if axis in collective.axes)
        # A gradient shard is a sum of whole rows, so a sum over their length cannot wait for the
        # end. Times a gradient's collective runs in a step of k micro-batches: 0 where one
        # all-reduce at the end replaces it, 1 with reduce="end", k with reduce="every".
        waits = collective.is_gradient and LENGTH not in collective.axes
        times = np.where(at_end, 0.0, np.where(shards.reduces_once, 1.0, k)) if waits else k
        times = collective.site.trips * times * shards.shares([collective.site.loops])[0]
        wire[name] = wire.get(name, 0.0) + times * sent
        links[name] = links.get(name, 0.0) + times * seconds
    if at_end.any():
        name = tuple(axis for axis in cases[0][0] if axis in gradient_shard_axes())
        n = count_shards(name, shards.sizes)
        sent = np.array(unreduced) * machine.width / 4 * 2 * (n - 1) / n
        hops = 2 * (n - 1) * machine.network.chip.latency
        seconds = sent / shards.rate(frozenset(name), machine.network) + hops
        wire[name] = wire.get(name, 0.0) + np.where(at_end, sent, 0.0)
        links[name] = links.get(name, 0.0) + np.where(at_end, seconds, 0.0)
    return Estimates(
        temp=shards.bytes_of(costs.live_bytes).max(axis=0),
        compute=k * compute.sum(axis=0),
        memory=k * memory.sum(axis=0),
        wire=wire,
        communication=links,
    )


def compute_seconds(
    costs: StepCosts, shards: "ShardCounts", machine: Machine
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of products and of other writes of one micro-batch: f64[phases, cases] each."""
    work, chip = costs.log.compute, machine.network.chip
    sites = [w.site for w in work]
    times = np.array([s.trips for s in sites])[:, None] * shards.shares(s.loops for s in sites)
    moved = shards.bytes_of([w.bytes_moved for w in work]) / chip.memory_bandwidth
    flops = np.array([w.flops for w in work])[:, None] * shards.shares(w.split for w in work)
    padded = np.array([_tile_overhead(w, shards, chip.tile) for w in work])
    products = flops * padded / machine.peak / machine.efficiency
    seconds = np.maximum(products, moved / machine.memory_efficiency) * times
    is_product = np.array([bool(w.flops) for w in work])[:, None]
    by_phase = np.zeros((2, len(PHASES), seconds.shape[1]))
    phase = np.array([s.phase for s in sites])
    np.add.at(by_phase[0], phase, np.where(is_product, seconds, 0.0))
    np.add.at(by_phase[1], phase, np.where(is_product, 0.0, seconds))
    return by_phase[0], by_phase[1]


def _tile_overhead(product: Compute, shards: "ShardCounts", tile: int) -> np.ndarray:
    """FLOPs of whole tiles for each FLOP of a product: f64[cases].

    512 rows, 512 columns and a sum of 64 in tiles of 128: the sum fills half of a tile, so 2.
    """
    if not product.dims or tile == 1 or not all(n for n, _ in product.dims):
        return np.ones(len(shards.cases))
    elements = np.array([n for n, _ in product.dims])[:, None]
    sizes = elements * shards.shares(axes for _, axes in product.dims)
    rows, columns, summed = np.ceil(sizes / tile) * tile / sizes
    # One operand stays in the unit, by its summed dim and its own; the other streams past it.
    return summed * np.minimum(rows, columns)


def cost_collectives(
    costs: StepCosts, shards: "ShardCounts", machine: Machine
) -> Iterator[tuple[Collective, np.ndarray, np.ndarray]]:
    """Every collective with its wire bytes and seconds, of one execution: f64[cases] each."""
    has_small: dict[tuple[frozenset[str], float], np.ndarray] = {}
    for collective in costs.log.collectives:
        sent, latency = _wire_and_latency(collective, shards, machine)
        small = sent < _SMALL
        # A small one after another over the same axes is combined with it: no further latency.
        key = (collective.axes, collective.site.trips)
        combined = has_small.setdefault(key, np.zeros_like(small))
        rate = shards.rate(collective.axes, machine.network)
        seconds = sent / rate + np.where(small & combined, 0.0, latency)
        combined |= small
        yield collective, sent, seconds


class ShardCounts:
    """Number of shards that sets of axes make, for every case."""

    def __init__(self, cases: Sequence[MeshBatching], batch_scale: float) -> None:
        self.cases = cases
        # f64[cases], bool[cases], and mesh axis, or that of micro-batches → f64[cases].
        self.micro_batches = np.array([float(a.micro_batches) for _, a in cases])
        self.reduces_once = np.array([a.reduce == "end" for _, a in cases])
        self.sizes = {a: np.array([float(m[a]) for m, _ in cases]) for a in cases[0][0]}
        self.sizes[MICRO] = self.micro_batches / batch_scale
        self._rates: dict[frozenset[str], np.ndarray] = {}

    def all_reduces_at_end(self) -> np.ndarray:
        """Where one all-reduce over all row axes sums unreduced gradients: bool[cases].

        Unreduced gradients are replicated over the row axes, so that a compiler could scatter the
        sum only by a slice behind it; with `fsdp` alone it does, with `data` it does not.
        """
        known = {*gradient_shard_axes(), HEADS, MICRO}
        others = count_shards([axis for axis in self.sizes if axis not in known], self.sizes)
        unsharding = {*gradient_shard_axes()} - {*axes_splitting("rows", "weights")}
        data = count_shards([axis for axis in self.sizes if axis in unsharding], self.sizes)
        return self.reduces_once & (self.micro_batches > 1) & (data > 1) & (others == 1)

    def shares(self, groups: Iterable[frozenset[str]]) -> np.ndarray:
        """1 / number of shards of each group of axes: f64[groups, cases]."""
        listed = list(groups)
        share = {axes: 1 / count_shards(axes, self.sizes) for axes in set(listed)}
        return np.array([share[axes] for axes in listed])

    def bytes_of(self, values: Sequence[SymbolicBytes]) -> np.ndarray:
        """Bytes on one device: f64[values, cases]."""
        groups = sorted({axes for value in values for axes in value}, key=sorted)
        whole = np.array([[value.get(axes, 0.0) for axes in groups] for value in values])
        return whole @ self.shares(groups)

    def rate(self, axes: frozenset[str], network: Network) -> np.ndarray:
        """Bytes/s over a group of axes: f64[cases]."""
        if axes not in self._rates:
            meshes = {tuple(mesh.values()): mesh for mesh, _ in self.cases}
            rates = network.rates([*meshes.values()], axes)
            by_mesh = dict(zip(meshes, rates, strict=True))
            self._rates[axes] = np.array([by_mesh[tuple(mesh.values())] for mesh, _ in self.cases])
        return self._rates[axes]


def _wire_and_latency(
    collective: Collective, shards: ShardCounts, machine: Machine
) -> tuple[np.ndarray, np.ndarray]:
    """Wire bytes and seconds of latency of one execution, as the report's timeline counts them."""
    n, kind = count_shards(collective.axes, shards.sizes), collective.kind
    share = np.where(n > 1, 1.0, 0.0) if kind == "swap" else WIRE[kind] * (n - 1) / n
    scatters = collective.is_gradient and kind == "reduce-scatter"
    if scatters and collective.site.trips > 1 and machine.network.torus:
        # TPU compilers make it a chain of permutes behind its product, and the last goes home.
        share = np.where(n > 2, 1.0, share)
    sent = share * shards.bytes_of([collective.payload])[0]
    hops = np.minimum(n - 1, 1) if kind == "swap" else WIRE[kind] * (n - 1)
    return sent, hops * machine.network.chip.latency
