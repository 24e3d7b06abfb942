"""One run from a declaration to a score: data, mesh, step, loop, evaluation, sample."""

from collections.abc import Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from rich.console import Console

from ..data import DataConfig, load_text
from ..models import DecoderConfig
from ..parallel import Strategy
from . import _console as show
from ._config import TrainConfig
from ._declare import compile_run
from ._live import run_live
from ._resume import choose_beginning
from ._scores import Result, Timer, score_run
from ._session import open_session


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

    A run that was ended at any instant is gone on with, from its last whole checkpoint, when it
    is called again with the same settings; see `TrainConfig.resume`.

    Args:
      name: of the run.
      model: the decoder.
      data: the text.
      mesh: devices.
      strategy: what is laid out on which axis.
      optimizer: an optax chain for `loop.steps` updates.
      loop: how long, what is said on the way, and what is kept.
      record: settings as plain values; the first line of the metrics file, and in checkpoints.
      compiling: `mode` and `compiler_options` for `compile_step`.
      console: where the run is shown; standard output by default.

    Raises:
      ShardkitError: the declaration or the data cannot be used, the loss diverges, or a
        checkpoint cannot be read or written.
      KeyboardInterrupt: with notes that say what is saved and where the metrics are.
      Stopped: the same after SIGTERM.
    """
    console = console or show.standard_output()
    text = load_text(data)
    beginning = choose_beginning(name, loop, record, text)
    show.show_mesh(console, mesh)
    show.show_data(console, text)
    for note in beginning.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    timer = Timer()
    adapter, step = compile_run(model, data, mesh, strategy, optimizer, compiling)
    console.print(f"[bold]compiled[/] in {timer.lap('compile'):.1f} s", highlight=False)
    with open_session(beginning, step, text, loop, record, console, timer.seconds) as session:
        show.show_layout(console, session.state)
        file = session.file
        console.print(f"[bold]metrics[/] {file.path}\n", highlight=False, soft_wrap=True)
        state = run_live(session, step, text, loop, console, show.is_simulated(mesh))
        timer.lap("train")
        result = score_run(step, state, adapter, text, loop, file, console, timer)
    spent = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in timer.seconds.items())
    console.print(f"\n{spent}. Metrics: {file.path}", highlight=False, soft_wrap=True)
    return result
