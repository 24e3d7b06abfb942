"""Throughput: tokens or rows per second, and the share of the devices' peak FLOP/s (MFU)."""

import dataclasses

import jax.numpy as jnp

from .._core.tree import short_dtype
from ..hardware import identify_chip
from ..report import count_flops
from ..step import CompiledStep
from ._console import is_simulated


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What one update processes, from which seconds per update give a speed."""

    count: int  # tokens or rows of one batch
    unit: str  # `tokens` or `rows`
    simulated: bool  # whether devices are threads of one CPU, whose speed means nothing
    # FLOPs of the model per update on all devices: forward and backward pass, without recomputation
    flops: int = 0
    # FLOP/s of all devices in the compute dtype; None if the hardware table lacks them
    peak: float | None = None

    @classmethod
    def of(cls, step: CompiledStep, tokens: int | None) -> "Throughput":
        """Reads a compiled step; `tokens` of one batch, or None to count rows instead.

        Counting FLOPs in its jaxpr compiles and runs nothing.
        """
        count, unit = (step.layout.rows, "rows") if tokens is None else (tokens, "tokens")
        simulated = is_simulated(step.mesh)
        chip = identify_chip(step.mesh.devices.flat[0].device_kind)
        if chip is None:
            return cls(count, unit, simulated)
        computed = step.spec.precision.compute_dtypes(step.layout.state.params)
        dtype = short_dtype(jnp.dtype(computed.main))
        if dtype not in chip.flops:
            return cls(count, unit, simulated)
        flops = count_flops(step.program.jaxpr).model
        return cls(count, unit, simulated, flops, chip.flops[dtype] * step.mesh.size)

    def mfu(self, seconds: float) -> float | None:
        """Returns model FLOPs utilization (0 to 1) at `seconds` per update, or None."""
        return self.flops / seconds / self.peak if self.peak else None

    def columns(self, seconds: float) -> dict[str, float]:
        """Returns the columns of a metrics row for an update that took `seconds`."""
        mfu = self.mfu(seconds)
        share = {} if mfu is None else {"mfu": mfu}
        return {f"{self.unit}_per_second": self.count / seconds, **share}

    def text(self, seconds: float) -> str:
        """Returns the speed at `seconds` per update, as the progress line shows it.

        >>> Throughput(2048, "tokens", True).text(0.5)
        '4,096 tokens/s (simulated)'
        >>> Throughput(2048, "tokens", False, flops=10**12, peak=4e12).text(0.5)
        '4,096 tokens/s  MFU 50.0%'
        """
        speed = f"{self.count / seconds:,.0f} {self.unit}/s{' (simulated)' * self.simulated}"
        mfu = self.mfu(seconds)
        return speed if mfu is None else f"{speed}  MFU {mfu:.1%}"
