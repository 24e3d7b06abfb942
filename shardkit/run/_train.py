"""One run from a declaration to a score: data, mesh, step, loop, evaluation, sample."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text as Plain

from ..data import DataConfig, Loader, load_text
from ..models import DecoderConfig
from ..parallel import Strategy
from ..processes import Peers
from . import _console as show
from ._declare import compile_run, decoder_model
from ._scores import Result, Score
from ._text import Scores, describe_text, spread
from ._text_config import TextTrainConfig
from ._trainer import Trainer

# Devices, mesh and layout decide none of the numbers.
_DECIDES = ("model", "data", "optimizer", "strategy.precision", "train.seed", "train.steps")


def train(
    *,
    name: str,
    model: DecoderConfig,
    data: DataConfig,
    mesh: Mesh,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    loop: TextTrainConfig,
    record: Mapping[str, Any],
    compiling: Mapping[str, Any] | None = None,
    console: Console | None = None,
    peers: Peers | None = None,
) -> Result:
    """Trains a decoder on text, scores it on held-out text, and lets it write.

    A run that was ended at any instant is gone on with, from its last whole checkpoint, when it
    is called again with the same settings; see `TextTrainConfig.resume`.

    Args:
      name: of the run.
      model: the decoder.
      data: the text.
      mesh: devices.
      strategy: what is laid out on which axis.
      optimizer: an optax chain for `loop.steps` updates.
      loop: how long, what is said on the way, what is kept, and what the model writes.
      record: settings as plain values; the first line of the metrics file, and in checkpoints.
      compiling: keywords of `compile_step`: `mode`, `compiler_options`, `on_nonfinite`, ….
      console: where the run is shown; standard output by default.
      peers: from `distributed`, where several processes run together.

    Raises:
      ShardkitError: the declaration or the data cannot be used, the loss diverges, or a
        checkpoint cannot be read or written.
      KeyboardInterrupt: with notes that say what is saved and where the metrics are.
      Stopped: the same after SIGTERM.
    """
    peers = peers or Peers()
    console = Console(quiet=True) if peers.index else console or show.standard_output()
    text = load_text(data, model.vocab)
    show.show_mesh(console, mesh)
    show.show_data(console, text)

    @functools.cache
    def compiled() -> Any:
        return compile_run(model, data, mesh, strategy, optimizer, compiling)[1]

    def evaluate(step: Any, state: Any) -> Mapping[str, float]:
        return Scores.of(step, state, text, spread(text, loop.eval_batches)).metrics

    score = Score(decoder_model(model), text, loop, console)
    Trainer(
        compiled,
        Loader(text, lambda: compiled().batch_shardings, prefetch=data.prefetch),
        Path(loop.out) if loop.out else Path("runs") / name,
        loop,
        evaluate=evaluate,
        watchers=[score],
        record=record,
        decides=_DECIDES,
        tokens=data.batch_size * data.seq_len,
        describe=functools.partial(describe_text, unit=text.unit),
        console=console,
        peers=peers,
    ).run()
    assert score.result is not None  # only a watcher could have ended the run before
    where = score.result.folder / "metrics.jsonl"
    console.print(Plain(f"Metrics: {where}"), soft_wrap=True)
    return score.result
