"""Legal layouts before they are estimated, and the candidates that become of them."""

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

_ONE_BATCH = Accumulate()


@dataclasses.dataclass(frozen=True)
class PlannedCase:
    """One layout, without its remat policy."""

    sizes: Mapping[str, int]  # size of each mesh axis
    batching: Batching = _ONE_BATCH  # micro-batches, or the pipeline's schedule
    zero: int = 0  # ZeRO stage
    attention: str = ""  # method of attention along a split length
    state_bytes: StateBytes | None = None  # exact bytes; None where the layout is not legal

    @property
    def is_staged(self) -> bool:
        """Whether its layers are split over stages."""
        return isinstance(self.batching, PipelineOptions)

    @property
    def exact(self) -> StateBytes:
        """Exact bytes of a legal layout."""
        assert self.state_bytes is not None
        return self.state_bytes

    def declaration(self, remat: str) -> str:
        """Code of the layout under a remat policy, of ready strategies."""
        options = (self.batching, remat, self.zero, self.attention)
        return format_layout(self.sizes, *options, like=self.exact.strategy)

    def __str__(self) -> str:
        """Returns `data=2, fsdp=4, accumulate=2`."""
        text = ", ".join(f"{axis}={n}" for axis, n in self.sizes.items())
        text += f", {self.batching}" if isinstance(self.batching, PipelineOptions) else ""
        text += f", {self.attention} attention" if self.attention else ""
        accumulates = isinstance(self.batching, Accumulate) and self.batching.micro_batches > 1
        return text + (f", accumulate={self.batching.micro_batches}" if accumulates else "")


def estimate_cases(
    costs: StepCosts,
    remat: str,
    cases: Sequence[PlannedCase],
    machine: Machine,
    batch_scale: float = 1.0,
) -> list[Candidate]:
    """Estimates layouts that share the symbolic costs of a step under a remat policy.

    All are in stages, or none. Costs are as if the batch had `batch_scale` times its rows.
    """
    waits = np.zeros(len(cases))
    staged = [(c.sizes, c.batching) for c in cases if isinstance(c.batching, PipelineOptions)]
    plain = [(c.sizes, c.batching) for c in cases if isinstance(c.batching, Accumulate)]
    if staged:
        exact = [c.exact for c in cases]
        estimates, waits = estimate_stages(costs, staged, exact, machine, batch_scale)
    else:
        unreduced = [c.exact.unreduced for c in cases]
        estimates = estimate(costs, plain, machine, batch_scale=batch_scale, unreduced=unreduced)
    candidates = _build_candidates(
        cases, estimates, waits, remat=remat, machine=machine, batch_scale=batch_scale
    )
    return list(candidates)


def _build_candidates(
    cases: Sequence[PlannedCase],
    estimates: Estimates,
    waits: np.ndarray,
    *,
    remat: str,
    machine: Machine,
    batch_scale: float,
) -> Iterator[Candidate]:
    chip = machine.network.chip
    seconds = estimates.seconds(machine.overlap) + waits
    wires = {", ".join(name): v.tolist() for name, v in estimates.wire.items()}
    links = {", ".join(name): v.tolist() for name, v in estimates.communication.items()}
    for i, case in enumerate(cases):
        exact, batching = case.exact, case.batching
        wire = {name: v[i] for name, v in wires.items() if v[i]}
        times = {name: v[i] for name, v in links.items() if v[i]}
        extra = 0.0
        for axis, sent in exact.extra_sends(case.sizes, batch_scale):
            spent = sent / float(machine.network.rates([case.sizes], [axis])[0])
            wire[axis] = wire.get(axis, 0.0) + sent
            times[axis] = times.get(axis, 0.0) + spent
            extra += spent
        update = 2 * exact.state / chip.memory_bandwidth
        pipeline = batching if isinstance(batching, PipelineOptions) else None
        accumulate = batching if isinstance(batching, Accumulate) else Accumulate()
        accumulator = 0 if pipeline else accumulator_bytes(exact, accumulate)
        yield Candidate(
            mesh=case.sizes,
            accumulate=accumulate,
            remat=remat,
            zero=case.zero,
            state=exact.state,
            batch=exact.batch,
            temp=float(estimates.temp[i]) + accumulator,
            capacity=chip.memory,
            seconds=float(seconds[i]) + update + extra * (1 - machine.overlap),
            compute=float(estimates.compute[i]),
            memory=float(estimates.memory[i]) + update,
            communication=times,
            wire=wire,
            pipeline=pipeline,
            attention=case.attention,
            bubble=float(waits[i]),
        )
