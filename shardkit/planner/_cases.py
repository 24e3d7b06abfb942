"""Layouts with what is known of them before they are estimated, and what becomes of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .._core.types import Accumulate
from ._candidate import Candidate
from ._estimate import Estimates, Machine, estimate
from ._space import Batching, PipelineOptions, format_layout
from ._stages import estimate_stages
from ._state_bytes import StateBytes, accumulator_bytes
from ._trace import StepCosts

_ONCE = Accumulate()


@dataclasses.dataclass(frozen=True)
class PlannedCase:
    """One legal layout, but for its remat policy.

    Attributes:
      sizes: size of each mesh axis.
      how: micro-batches, or how its pipeline is worked off.
      zero: ZeRO stage.
      attention: how attention looks along a split length.
      placed: exact bytes; None where nothing could be laid out.
    """

    sizes: Mapping[str, int]
    how: Batching = _ONCE
    zero: int = 0
    attention: str = ""
    placed: StateBytes | None = None

    @property
    def staged(self) -> bool:
        """Whether its layers are in stages."""
        return isinstance(self.how, PipelineOptions)

    @property
    def own(self) -> StateBytes:
        """Exact bytes of a case that is legal."""
        assert self.placed is not None
        return self.placed

    def __str__(self) -> str:
        """Returns `data=2, fsdp=4, accumulate=2`."""
        shown = ", ".join(f"{axis}={n}" for axis, n in self.sizes.items())
        shown += f", {self.how}" if isinstance(self.how, PipelineOptions) else ""
        shown += f", {self.attention} attention" if self.attention else ""
        accumulated = isinstance(self.how, Accumulate) and self.how.micro_batches > 1
        return shown + (f", accumulate={self.how.micro_batches}" if accumulated else "")


def estimate_cases(
    walked: StepCosts,
    remat: str,
    cases: Sequence[PlannedCase],
    machine: Machine,
    batch_scale: float = 1.0,
) -> list[Candidate]:
    """Estimates layouts that one walk serves.

    Args:
      walked: what one step's loss and gradient do under `remat`.
      remat: the policy.
      cases: all in stages, or none.
      machine: the devices.
      batch_scale: as if the batch had so many times its rows.
    """
    bubbles = np.zeros(len(cases))
    staged = [(c.sizes, c.how) for c in cases if isinstance(c.how, PipelineOptions)]
    plain = [(c.sizes, c.how) for c in cases if isinstance(c.how, Accumulate)]
    if staged:
        own = [c.own for c in cases]
        values, bubbles = estimate_stages(walked, staged, own, machine, batch_scale)
    else:
        lanes = [c.own.lane for c in cases]
        values = estimate(walked, plain, machine, batch_scale, lanes)
    return list(_build_candidates(remat, cases, values, bubbles, machine, batch_scale))


def _build_candidates(
    remat: str,
    cases: Sequence[PlannedCase],
    values: Estimates,
    bubbles: np.ndarray,
    machine: Machine,
    batch_scale: float,
) -> Iterator[Candidate]:
    chip = machine.network.chip
    seconds = values.seconds(machine.overlap) + bubbles
    wires = {", ".join(name): v.tolist() for name, v in values.wire.items()}
    links = {", ".join(name): v.tolist() for name, v in values.communication.items()}
    for i, one in enumerate(cases):
        own, how = one.own, one.how
        wire = {name: v[i] for name, v in wires.items() if v[i]}
        times = {name: v[i] for name, v in links.items() if v[i]}
        beside = 0.0
        for axis, sent in own.sent_beside(one.sizes, batch_scale):
            spent = sent / float(machine.network.rates([one.sizes], [axis])[0])
            wire[axis] = wire.get(axis, 0.0) + sent
            times[axis] = times.get(axis, 0.0) + spent
            beside += spent
        update = 2 * own.state / chip.memory_bandwidth
        plain = isinstance(how, Accumulate)
        yield Candidate(
            mesh=one.sizes,
            accumulate=how if plain else Accumulate(),
            remat=remat,
            zero=one.zero,
            state=own.state,
            batch=own.batch,
            temp=float(values.temp[i]) + (accumulator_bytes(own, how) if plain else 0),
            capacity=chip.memory,
            seconds=float(seconds[i]) + update + beside * (1 - machine.overlap),
            compute=float(values.compute[i]),
            memory=float(values.memory[i]) + update,
            communication=times,
            wire=wire,
            declaration=format_layout(one.sizes, how, remat, one.zero, one.attention),
            pipeline=None if plain else how,
            attention=one.attention,
            bubble=float(bubbles[i]),
        )
