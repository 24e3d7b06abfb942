"""How fast updates are: tokens or rows per second, and the share of the devices' peak."""

import dataclasses

import jax.numpy as jnp

from .._tree import short_dtype
from ..hardware import chip_of
from ..inspect import count_flops
from ..step import CompiledStep
from ._console import is_simulated


@dataclasses.dataclass(frozen=True)
class Rate:
    """What an update comes to, whatever it takes.

    Attributes:
      count: tokens or rows of one batch.
      unit: which of them.
      simulated: whether devices are threads of one CPU, whose speed says nothing.
      flops: of the model, all devices together: forward and backward pass, each product once.
      peak: FLOP/s of all devices together in the dtype that the model computes in; None where
        the devices are in no table.
    """

    count: int
    unit: str
    simulated: bool
    flops: int = 0
    peak: float | None = None

    @classmethod
    def of(cls, step: CompiledStep, tokens: int | None) -> "Rate":
        """Reads a compiled step: counting FLOPs in its jaxpr runs and compiles nothing."""
        count, unit = (step.layout.rows, "rows") if tokens is None else (tokens, "tokens")
        chip = chip_of(step.mesh.devices.flat[0].device_kind)
        dtype = short_dtype(jnp.dtype(step.spec.precision.compute))
        each = chip.flops.get(dtype) if chip else None
        if each is None:
            return cls(count, unit, is_simulated(step.mesh))
        flops = count_flops(step.program.jaxpr).model
        return cls(count, unit, is_simulated(step.mesh), flops, each * step.mesh.size)

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization of an update of so many seconds, or None."""
        return self.flops / seconds / self.peak if self.peak else None

    def columns(self, seconds: float) -> dict[str, float]:
        """Returns what a row of metrics says of an update of so many seconds."""
        mfu = self.mfu(seconds)
        share = {} if mfu is None else {"mfu": mfu}
        return {f"{self.unit}_per_second": self.count / seconds, **share}

    def text(self, seconds: float) -> str:
        """Returns what a person is told of updates of so many seconds.

        >>> Rate(2048, "tokens", True).text(0.5)
        '4,096 tokens/s (simulated)'
        >>> Rate(2048, "tokens", False, flops=10**12, peak=4e12).text(0.5)
        '4,096 tokens/s  MFU 50.0%'
        """
        said = f"{self.count / seconds:,.0f} {self.unit}/s{' (simulated)' * self.simulated}"
        mfu = self.mfu(seconds)
        return said if mfu is None else f"{said}  MFU {mfu:.1%}"
