"""What a run comes to: a score on held-out text, beside compressors, and a sample."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ..adapters import Model
from ..data import Baselines, DataConfig, Text, measure_baselines
from . import _console as show
from ._config import TrainConfig
from ._folder import MetricsFile
from ._loop import Step, held_out_bits
from ._sample import printable, sample_bytes


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      folder: where its files are.
      bits_per_byte: over all held-out bytes.
      held_out_bytes: how many these are; each was scored once.
      baselines: compressors on the same bytes, or None where they were not asked for.
      sample: bytes that the model wrote.
      seconds: wall time by part: `compile`, `train`, `evaluate`, `baselines`, `sample`.
    """

    folder: Path
    bits_per_byte: float
    held_out_bytes: int
    baselines: Baselines | None
    sample: bytes
    seconds: Mapping[str, float]


@dataclasses.dataclass
class Timer:
    """Wall time of the parts of a run."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: float = dataclasses.field(default_factory=time.perf_counter)

    def lap(self, part: str) -> float:
        """Names what went on since the last lap."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
        return self.seconds[part]


def score_run(
    step: Step,
    state: Any,
    adapter: Model,
    text: Text,
    loop: TrainConfig,
    file: MetricsFile,
    console: Console,
    timer: Timer,
) -> Result:
    """Scores a trained state on all held-out bytes, shows it among compressors, and samples."""
    bits, scored = held_out_bits(step, state, text, range(text.held_out_steps))
    timer.lap("evaluate")
    file.write("eval", step=loop.steps, bits_per_byte=bits, bytes=scored, part="all")
    baselines = None
    if loop.baselines:
        baselines = measure_baselines(text.corpus)
        timer.lap("baselines")
    show.show_scores(console, bits, scored, loop.steps, baselines)
    sample = _sample(adapter, state.params, text.config, loop)
    timer.lap("sample")
    if sample:
        show.show_sample(console, printable(sample).splitlines())
    file.write(
        "result",
        bits_per_byte=bits,
        bytes=scored,
        baselines=dataclasses.asdict(baselines) if baselines else None,
        sample=printable(sample),
        seconds=timer.seconds,
    )
    return Result(file.path.parent, bits, scored, baselines, sample, timer.seconds)


def _sample(adapter: Model, params: Any, data: DataConfig, loop: TrainConfig) -> bytes:
    def next_byte(params: Any, row: jax.Array, at: jax.Array) -> jax.Array:
        model = adapter.bind(params)
        return model.logits(model(row)[0, at])

    if not loop.sample:
        return b""
    key = jax.random.fold_in(jax.random.key(loop.seed), loop.steps)
    return sample_bytes(next_byte, params, loop.sample, data.length, loop.temperature, key)
