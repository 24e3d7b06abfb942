"""`shardkit train`: data, mesh, step, loop, evaluation and sample of one run on text."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text as ConsoleText

from ..data import DataConfig, Loader, load_text
from ..parallel import Strategy
from ..processes import ProcessGroup
from ..run import Trainer, label_text, show_mesh, standard_output
from ._config import TextTrainConfig
from ._declare import compile_run, decoder_model
from ._decoder_config import DecoderConfig
from ._scores import TextScores, describe_text_metrics, spread_batches
from ._summary import Summary, TrainResult

# Settings that must be equal to resume. Devices, mesh and layout do not change the numbers.
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
    process_group: ProcessGroup | None = None,
) -> TrainResult:
    """Trains a decoder on text, scores it on validation text, and samples from it.

    Call it again with the same settings to resume an interrupted run; see
    `TrainConfig.resume`.

    Args:
      name: of the run.
      model: the decoder.
      data: the text.
      mesh: of the devices.
      strategy: what is sharded over which axis.
      optimizer: an optax chain for `loop.steps` updates.
      loop: how long the run is, what it reports and keeps, and how long the sample is.
      record: settings as plain values; the first row of the metrics file, and in checkpoints.
      compiling: keywords of `compile_step`: `mode`, `compiler_options`, `on_nonfinite`, ….
      console: where the run is shown; standard output by default.
      process_group: from `distributed`, if several processes run together.

    Raises:
      ShardkitError: the declaration or the data cannot be used, the loss diverges, or a
        checkpoint cannot be read or written.
      KeyboardInterrupt: after Ctrl-C, with notes that say what is saved and where metrics are.
      Stopped: the same after SIGTERM.
    """
    process_group = process_group or ProcessGroup()
    console = Console(quiet=True) if process_group.index else console or standard_output()
    text = load_text(data, model.vocab)
    show_mesh(console, mesh)
    console.print(label_text("data", f" {text.describe()}"), soft_wrap=True)

    @functools.cache
    def compile_once() -> Any:
        return compile_run(model, data, mesh, strategy, optimizer, **(compiling or {}))

    def evaluate(step: Any, state: Any) -> Mapping[str, float]:
        batches = spread_batches(text, loop.eval_batches)
        return TextScores.of(step, state, text, batches).metrics

    summary = Summary(decoder_model(model), text, loop, console)
    Trainer(
        compile_once,
        Loader(text, lambda: compile_once().batch_shardings, prefetch=data.prefetch),
        Path(loop.out) if loop.out else Path("runs") / name,
        loop,
        evaluate=evaluate,
        callbacks=[summary],
        record=record,
        decides=_DECIDES,
        tokens=data.batch_size * data.seq_len,
        describe=functools.partial(describe_text_metrics, unit=text.unit),
        console=console,
        process_group=process_group,
    ).run()
    assert summary.result is not None  # only a callback could have ended the run before
    where = summary.result.folder / "metrics.jsonl"
    console.print(ConsoleText(f"Metrics: {where}"), soft_wrap=True)
    return summary.result
