"""Spikes of the loss and of the gradient norm, as rows of the metrics."""

import math
from typing import Any

from ..guards import Spikes
from ._watch import Numbers, Run, Watcher


class WatchSpikes(Watcher):
    """Writes a row where the loss or the gradient norm jumps above what was expected."""

    def __init__(self) -> None:
        """Norms scatter more than losses do: they have to triple to count."""
        self._watched = {"loss": Spikes(), "grad_norm": Spikes(ratio=2.0)}
        self._run: Run | None = None

    def begin(self, run: Run, state: Any) -> None:
        """Learns where to write."""
        self._run = run

    def read(self, numbers: Numbers) -> None:
        """Looks at both."""
        assert self._run is not None
        for name, watched in self._watched.items():
            value = numbers.values.get(name, math.nan)
            spike = watched.look(value) if math.isfinite(value) else None
            if spike is not None:
                both = {one: numbers.values.get(one) for one in self._watched}
                about = {"of": name, "expected": spike.expected, "limit": spike.limit}
                self._run.write("spike", step=numbers.step, **about, **both)
                times = f"{value:.4g}, expected {spike.expected:.4g}"
                self._run.say(f"step {numbers.step}: {name} spikes to {times}")
