"""One run from a declaration to a score: data, mesh, step, loop, evaluation, sample."""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from ..data import Baselines, DataConfig, Text, load_text, measure_baselines
from ..models import DecoderConfig
from ..parallel import Strategy
from ..step import compile_step
from . import _console as show
from ._config import TrainConfig
from ._declare import batch_shapes, decoder_model
from ._folder import MetricsFile, new_folder
from ._loop import held_out_bits, run_steps
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
class _Timer:
    """Wall time of the parts of a run."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: float = dataclasses.field(default_factory=time.perf_counter)

    def lap(self, part: str) -> float:
        """Names what went on since the last lap."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
        return self.seconds[part]


def train(
    *,
    name: str,
    model: DecoderConfig,
    data: DataConfig,
    mesh: Mesh,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    loop: TrainConfig,
    record: Mapping[str, Any],
    compiling: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Result:
    """Trains a decoder on text, scores it on held-out text, and lets it write.

    Args:
      name: of the run.
      model: the decoder.
      data: the text.
      mesh: devices.
      strategy: what is laid out on which axis.
      optimizer: an optax chain for `loop.steps` updates.
      loop: how long, and what is said on the way.
      record: goes into the first line of the metrics file.
      compiling: `mode` and `compiler_options` for `compile_step`.
      console: where the run is shown; standard output by default.

    Raises:
      ShardkitError: the declaration or the data cannot be used, or the loss diverges.
      KeyboardInterrupt: with a note that says where the metrics are.
    """
    console = console or show.standard_output()
    text = load_text(data)
    show.show_mesh(console, mesh)
    show.show_data(console, text)
    timer = _Timer()
    adapter = decoder_model(model)
    declared = {"init": adapter.init, "batch": batch_shapes(data), "mesh": mesh}
    declared |= compiling or {}
    step = compile_step(adapter.loss_fn, optimizer, strategy=strategy, **declared)
    state = step.init(jax.random.key(loop.seed))
    console.print(f"[bold]compiled[/] in {timer.lap('compile'):.1f} s", highlight=False)
    show.show_layout(console, state)

    folder = new_folder(Path(loop.out) if loop.out else Path("runs") / name)
    with MetricsFile(folder) as file:
        console.print(f"[bold]metrics[/] {file.path}\n", highlight=False, soft_wrap=True)
        file.write("start", config=record, **_environment(mesh), seconds=timer.seconds)
        try:
            simulated = show.is_simulated(mesh)
            with show.LiveShow(console, loop.steps, loop.log_every, simulated) as live:
                state = run_steps(step, state, text, loop, file, live)
            timer.lap("train")
            bits, scored = _score(step, state, text, loop, file, timer)
            baselines = _baselines(text, loop, timer)
            show.show_scores(console, bits, scored, loop.steps, baselines)
            sample = _sample(adapter, state.params, data, loop)
            timer.lap("sample")
        except KeyboardInterrupt as stop:
            file.write("stopped", why="interrupted")
            stop.add_note(f"Metrics so far are in {file.path}.")
            raise
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
    spent = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in timer.seconds.items())
    console.print(f"\n{spent}. Metrics: {file.path}", highlight=False, soft_wrap=True)
    return Result(folder, bits, scored, baselines, sample, timer.seconds)


def _score(
    step: Any, state: Any, text: Text, loop: TrainConfig, file: MetricsFile, timer: _Timer
) -> tuple[float, int]:
    bits, scored = held_out_bits(step, state, text, range(text.held_out_steps))
    timer.lap("evaluate")
    file.write("eval", step=loop.steps, bits_per_byte=bits, bytes=scored, part="all")
    return bits, scored


def _baselines(text: Text, loop: TrainConfig, timer: _Timer) -> Baselines | None:
    if not loop.baselines:
        return None
    baselines = measure_baselines(text.corpus)
    timer.lap("baselines")
    return baselines


def _sample(adapter: Any, params: Any, data: DataConfig, loop: TrainConfig) -> bytes:
    def next_byte(params: Any, row: jax.Array, at: jax.Array) -> jax.Array:
        model = adapter.bind(params)
        return model.logits(model(row)[0, at])

    if not loop.sample:
        return b""
    key = jax.random.fold_in(jax.random.key(loop.seed), loop.steps)
    return sample_bytes(next_byte, params, loop.sample, data.length, loop.temperature, key)


def _environment(mesh: Mesh) -> dict[str, Any]:
    """What a reader of the numbers has to know of where they come from."""
    device = mesh.devices.flat[0]
    names = ("shardkit", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "mesh": dict(mesh.shape),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": mesh.size,
            "simulated": show.is_simulated(mesh),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names if _installed(name)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _installed(name: str) -> bool:
    """Whether a distribution is known; shardkit itself is not where it runs from a checkout."""
    return any(True for _ in importlib.metadata.distributions(name=name))
