"""Spikes of the loss and of the gradient norm, as rows of the metrics."""

import math
from typing import Any

from ..guards._spikes import SpikeDetector
from ._callback import Callback, RunContext, StepMetrics


class SpikeLog(Callback):
    """Writes a row when the loss or the gradient norm jumps above its expected range.

    {"kind": "spike", "step": 41, "of": "loss", "expected": 2.1, "limit": 2.6,
     "loss": 7.0, "grad_norm": 3.0, ...}
    """

    def __init__(self) -> None:
        """Gradient norms scatter more than losses do, so they must triple to count."""
        self._detectors = {"loss": SpikeDetector(), "grad_norm": SpikeDetector(ratio=2.0)}

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run

    def on_step(self, metrics: StepMetrics) -> None:
        for name, detector in self._detectors.items():
            value = metrics.values.get(name, math.nan)
            spike = detector.update(value) if math.isfinite(value) else None
            if spike is not None:
                both = {metric: metrics.values.get(metric) for metric in self._detectors}
                about = {"of": name, "expected": spike.expected, "limit": spike.limit}
                self._run.write("spike", step=metrics.step, **about, **both)
                numbers = f"{value:.4g}, expected {spike.expected:.4g}"
                self._run.say(f"step {metrics.step}: {name} spikes to {numbers}")
