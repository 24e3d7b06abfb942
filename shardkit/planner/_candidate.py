"""One layout of a plan, with its estimate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._core.tree import format_bytes
from .._core.types import Accumulate
from ._space import PipelineOptions


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout with its estimate. Bytes and seconds are per device and step, modelled.

    Attributes:
      mesh: size of each axis.
      accumulate: micro-batches; those of a pipeline are its own.
      remat: checkpoint policy.
      zero: ZeRO stage over `data`; 0 for none.
      state: bytes of parameters, optimizer state, model_state, counter and key; exact.
      batch: bytes of its share of the batch; exact.
      temp: bytes of activations, gradients and scratch.
      capacity: bytes of the device.
      seconds: of a step.
      compute: seconds of products.
      memory: seconds of other memory traffic.
      communication: mesh axes, joined by commas → seconds on the links.
      wire: mesh axes, joined by commas → bytes sent.
      declaration: code that declares it.
      pipeline: schedule of the stages, if there are any.
      attention: method of attention along a split length; "" if it is not split.
      bubble: seconds in which a stage waits for others.
      compiled: figures of the target's compiler, if it was asked.
      failed: why it could not be compiled.
    """

    mesh: Mapping[str, int]
    accumulate: Accumulate
    remat: str
    zero: int
    state: int
    batch: int
    temp: float
    capacity: int
    seconds: float
    compute: float
    memory: float
    communication: Mapping[str, float]
    wire: Mapping[str, float]
    declaration: str = ""
    pipeline: PipelineOptions | None = None
    attention: str = ""
    bubble: float = 0.0
    compiled: Mapping[str, Any] | None = None
    failed: str = ""

    @property
    def total(self) -> float:
        """Bytes alive at once."""
        return self.state + self.batch + self.temp

    @property
    def margin(self) -> float:
        """Bytes left on the device; negative where it does not fit."""
        return self.capacity - self.total

    @property
    def bound(self) -> str:
        """What takes most of the step: compute, HBM, the bubble, or the links of some mesh axes."""
        parts = {"compute": self.compute, "HBM": self.memory, "the bubble": self.bubble}
        parts |= {f"links of {axes}": s for axes, s in self.communication.items()}
        return max(parts, key=lambda name: parts[name])

    @property
    def communication_bound(self) -> bool:
        """Whether the links of some mesh axes take most of the step."""
        return self.bound not in ("compute", "HBM", "the bubble")

    @property
    def layout(self) -> str:
        """The layout in words: `fsdp=16, tensor=4, remat=full`."""
        sizes = ", ".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "one device"
        options = ""
        if self.accumulate.micro_batches > 1:
            options = f", accumulate={self.accumulate.micro_batches} ({self.accumulate.reduce})"
        options += f", {self.pipeline}" if self.pipeline else ""
        options += f", {self.attention} attention" if self.attention else ""
        options += f", zero={self.zero}" if self.zero else ""
        return f"{sizes}{options}, remat={self.remat}"

    def __str__(self) -> str:
        """Returns `fsdp=16, tensor=4, remat=full: 12.0 ms, 1.50 GiB, bound by compute`."""
        time, size = f"{self.seconds * 1e3:.4g} ms", format_bytes(self.total)
        return f"{self.layout}: {time}, {size}, bound by {self.bound}"
