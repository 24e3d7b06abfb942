"""Stage one: every layout of a space, estimated; what cannot be is kept with its reason."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from .._errors import ShardkitError
from .._tree import nbytes, short_dtype
from .._types import Accumulate
from ..mesh import Target
from ..step import Declaration, Layout
from ._candidate import Candidate
from ._estimate import Case, Estimates, Machine, estimate
from ._network import Network
from ._space import Space, code_of, layout_of, symbolic
from ._trace import Model, Walked, walk_through

if TYPE_CHECKING:
    from ..hardware import Chip

_LANES_BYTES = 4  # gradients are added up in f32


@dataclasses.dataclass(frozen=True)
class Placed:
    """Exact bytes of one device on one mesh.

    Attributes:
      state: parameters, optimizer state, extra, counter and key.
      batch: its share of the batch.
      lane: its gradients in f32, unreduced over rows, as one reduction per step needs them.
      shard: its gradients in f32 as the parameters lie.
      refresh: bytes one device sends to gather the weights that ZeRO updated in parts.
    """

    state: int
    batch: int
    lane: int
    shard: int
    refresh: float


@dataclasses.dataclass
class Found:
    """What a search found, with every reason for what it left out."""

    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    rejected: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    considered: int = 0
    problems: tuple[str, ...] = ()

    def reject(self, why: str, example: str, number: int = 1) -> None:
        """Notes layouts that cannot be."""
        before, first = self.rejected.get(why, (0, example))
        self.rejected[why] = (before + number, first)
        self.considered += number


@dataclasses.dataclass
class Search:
    """A search for one model on one target.

    Attributes:
      model: the traced declaration.
      space: what is tried.
      machine: the devices.
      devices: their number.
    """

    model: Model
    space: Space
    machine: Machine
    devices: int
    walks: dict[tuple[str, int], Walked | str] = dataclasses.field(default_factory=dict)
    resolved: dict[tuple[Any, ...], Placed | str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        declared: Declaration,
        target: Target,
        space: Space,
        overlap: float,
        hardware: "Sequence[Chip]" = (),
    ) -> "Search":
        """Traces the declaration's state."""
        dtype = short_dtype(jax.numpy.dtype(declared.precision.compute))
        machine = Machine(Network.of(target, hardware), dtype, overlap)
        assert target.n_devices is not None
        return cls(Model.of(declared), space, machine, target.n_devices)

    def run(self, batch_scale: float = 1.0) -> Found:
        """Estimates everything."""
        found = Found()
        placed = self._placed(found)
        sizes = [dict(zip(self.space.axes, key[1:], strict=True)) for key in placed]
        for remat in self.space.remat:
            for zero in self.space.zero:
                legal = [sizes for key, sizes in self._meshes(zero) if key in placed]
                if legal:
                    walked = self._walked(remat, zero, symbolic(sizes))
                    self._family(remat, zero, legal, placed, walked, found, batch_scale)
        walks = [one for one in self.walks.values() if isinstance(one, Walked)]
        found.problems = tuple(dict.fromkeys(text for one in walks for text in one.problems))
        return found

    def again(self, one: Candidate, batch_scale: float) -> Candidate:
        """A candidate that this search found, as if the batch had so many times its rows."""
        walked = self.walks[one.remat, _stage(one.zero)]
        own = self.resolved[one.zero, *one.mesh.values()]
        assert isinstance(walked, Walked)
        assert isinstance(own, Placed)
        case = (one.mesh, one.accumulate)
        values = estimate(walked, [case], self.machine, batch_scale)
        return self._candidates(one.remat, one.zero, [case], [own], values)[0]

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return _rows(self.model.declared)

    @property
    def lengths(self) -> frozenset[int]:
        """Sizes of the dims that the model names `length`, once it was walked through."""
        found = [one.lengths for one in self.walks.values() if isinstance(one, Walked)]
        return frozenset().union(*found)

    def of_length(self, factor: float) -> "Search | None":
        """The same search for rows of another length; None where the batch has no such dim."""
        model = self.model.of_length(self.lengths, factor)
        return model and dataclasses.replace(self, model=model, walks={}, resolved={})

    def _meshes(self, zero: int) -> list[tuple[tuple[Any, ...], dict[str, int]]]:
        """Meshes on which a ZeRO stage means something, with their keys."""
        meshes = self.space.meshes(self.devices)
        return [
            ((zero, *sizes.values()), sizes)
            for sizes in meshes
            if not zero or sizes.get("data", 1) > 1
        ]

    def _placed(self, found: Found) -> dict[tuple[Any, ...], Placed]:
        """Resolves every distinct layout of the state; the exact bytes of each that is legal."""
        per_mesh = len(self.space.remat) * len(self.space.schedules())
        placed = {}
        for zero in self.space.zero:
            for key, sizes in self._meshes(zero):
                shown = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
                if self.machine.network.crossing(sizes) == "":
                    slices = self.machine.network.slices
                    found.reject(f"no axis is a multiple of the {slices} slices", shown, per_mesh)
                    continue
                if key not in self.resolved:
                    self.resolved[key] = self._resolve(sizes, zero)
                made = self.resolved[key]
                if isinstance(made, str):
                    found.reject(made, shown, per_mesh)
                else:
                    placed[key] = made
        return placed

    def _resolve(self, sizes: Mapping[str, int], zero: int) -> "Placed | str":
        """Exact bytes of a layout, or why there is none."""
        used = {a: n for a, n in sizes.items() if n > 1} or dict([*sizes.items()][:1])
        try:
            return placed_bytes(self.model.layout(used, layout_of(sizes, zero)))
        except Exception as error:  # rules are a user's code, and may raise anything
            return _reason(error)

    def _walked(self, remat: str, zero: int, sizes: Mapping[str, int]) -> "Walked | str":
        """One walk for all meshes, or why the loss cannot be traced."""
        stage = _stage(zero)
        if (remat, stage) not in self.walks:
            strategy = layout_of(sizes, stage if "data" in sizes else 0)
            try:
                flat = self.model.program(remat)
                layout = self.model.layout(sizes, strategy)
            except Exception as error:  # the loss is a user's code
                self.walks[remat, stage] = _reason(error)
            else:
                self.walks[remat, stage] = walk_through(
                    flat, layout, strategy, self.machine.network.lanes
                )
        return self.walks[remat, stage]

    def _family(
        self,
        remat: str,
        zero: int,
        meshes: Sequence[Mapping[str, int]],
        placed: Mapping[tuple[Any, ...], Placed],
        walked: Walked | str,
        found: Found,
        batch_scale: float,
    ) -> None:
        rows = _rows(self.model.declared)
        cases = []
        for schedule in self.space.schedules():
            for sizes in meshes:
                shown = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
                if rows % (sizes.get("data", 1) * sizes.get("fsdp", 1) * schedule.steps):
                    shown += f", accumulate={schedule.steps}"
                    why = f"a batch of {rows} rows that does not split into devices x micro-batches"
                    found.reject(why, shown)
                elif isinstance(walked, str):
                    found.reject(walked, f"{shown}, remat={remat}")
                else:
                    cases.append((sizes, schedule))
        if cases and isinstance(walked, Walked):
            values = estimate(walked, cases, self.machine, batch_scale)
            chosen = [placed[(zero, *sizes.values())] for sizes, _ in cases]
            found.candidates += self._candidates(remat, zero, cases, chosen, values)
            found.considered += len(cases)

    def _candidates(
        self,
        remat: str,
        zero: int,
        cases: Sequence[Case],
        placed: Sequence[Placed],
        values: Estimates,
    ) -> list[Candidate]:
        chip, shown = self.machine.network.chip, 1 - self.machine.overlap
        seconds = values.seconds(self.machine.overlap)
        made = []
        for i, (sizes, schedule) in enumerate(cases):
            own = placed[i]
            wire = {", ".join(name): float(v[i]) for name, v in values.wire.items() if v[i]}
            times = {", ".join(n): float(v[i]) for n, v in values.communication.items() if v[i]}
            refresh = 0.0
            if own.refresh:
                refresh = own.refresh / float(self.machine.network.rates([sizes], ["data"])[0])
                wire["data"] = wire.get("data", 0.0) + own.refresh
                times["data"] = times.get("data", 0.0) + refresh
            update = 2 * own.state / chip.memory_bandwidth
            made.append(
                Candidate(
                    mesh=sizes,
                    accumulate=schedule,
                    remat=remat,
                    zero=zero,
                    state=own.state,
                    batch=own.batch,
                    temp=float(values.temp[i]) + kept_bytes(own, schedule),
                    capacity=chip.memory,
                    seconds=float(seconds[i] + update + refresh * shown),
                    compute=float(values.compute[i]),
                    memory=float(values.memory[i] + update),
                    communication=times,
                    wire=wire,
                    declaration=code_of(sizes, schedule, remat, zero),
                )
            )
        return made


def _stage(zero: int) -> int:
    """ZeRO stage of a walk: gradients are reduced as parameters lie but with stage 2."""
    return 2 if zero == 2 else 0


def kept_bytes(placed: Placed, schedule: Accumulate) -> int:
    """Bytes of what micro-batches add up in."""
    if schedule.steps == 1:
        return 0
    return placed.lane if schedule.reduce == "once" else placed.shard


def _rows(declared: Declaration) -> int:
    return next((x.shape[0] for x in jax.tree.leaves(declared.batch) if x.shape), 0)


def placed_bytes(layout: Layout) -> Placed:
    """Exact bytes from the resolved shardings."""
    state, where = layout.state, layout.shardings
    held = sum(_shard_bytes(getattr(where, n), getattr(state, n)) for n in ("params", "opt_state"))
    held += _shard_bytes(where.extra, state.extra)
    held += nbytes(state.step.shape, state.step.dtype) + nbytes(state.key.shape, state.key.dtype)
    rows = set(layout.row_axes)
    mesh = next(iter(jax.tree.leaves(where.params))).mesh.shape
    lane = shard = 0
    refresh = 0.0
    updated = jax.tree.leaves(layout.update) if layout.update is not None else []
    for i, (sharding, x) in enumerate(_pairs(where.params, state.params)):
        whole = math.prod(x.shape)
        own = math.prod(sharding.shard_shape(x.shape))
        axes = {a for e in sharding.spec for a in ((e,) if isinstance(e, str) else e or ())}
        shard += own * _LANES_BYTES
        lane += own * math.prod(mesh[a] for a in axes & rows) * _LANES_BYTES
        if updated:
            part = math.prod(updated[i].shard_shape(x.shape))
            refresh += (own - part) * x.dtype.itemsize
        assert whole % own == 0
    return Placed(held, _shard_bytes(layout.batch_shardings, layout.batch), lane, shard, refresh)


def _pairs(shardings: Any, arrays: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(shardings), jax.tree.leaves(arrays), strict=True))


def _shard_bytes(shardings: Any, arrays: Any) -> int:
    return sum(nbytes(s.shard_shape(x.shape), x.dtype) for s, x in _pairs(shardings, arrays))


def _reason(error: Exception) -> str:
    """The first thing that does not fit, without the headline; of a user's code, what it raised."""
    lines = str(error).splitlines()
    if not isinstance(error, ShardkitError):
        return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return " ".join(lines[1 if len(lines) > 1 else 0].split())
