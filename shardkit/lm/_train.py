"""`shardkit train`: data, mesh, step, loop, evaluation and sample of one run on text."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text as ConsoleText

from ..data import DataConfig, Loader, load_source
from ..processes import ProcessGroup
from ..run import Trainer, label_text, show_mesh, standard_output
from ..step import CompiledStep, can_keep_programs
from ._declare import declare_run
from ._samples import Sampler
from ._scores import TextScores, describe_text_metrics, spread_batches
from ._summary import Summary, TrainResult
from ._tuning import Tuning

if TYPE_CHECKING:
    from ..parallel import Strategy
    from ._config import TextTrainConfig
    from ._decoder_config import DecoderConfig
    from ._lora import LoraConfig
    from ._tuning import Pretrained

# Settings that must be equal to resume. Devices, mesh and layout do not change the numbers.
_DECIDES = ("model", "data", "optimizer", "strategy.precision", "train.seed", "train.steps")
_DECIDES += ("lora", "weights.fingerprint")


def train(
    *,
    name: str,
    model: "DecoderConfig",
    data: DataConfig,
    mesh: Mesh,
    strategy: "Strategy",
    optimizer: optax.GradientTransformation,
    loop: "TextTrainConfig",
    record: Mapping[str, Any],
    lora: "LoraConfig | None" = None,
    pretrained: "Pretrained | None" = None,
    compiling: Mapping[str, Any] | None = None,
    cache: str = "off",
    console: Console | None = None,
    process_group: ProcessGroup | None = None,
) -> TrainResult:
    """Trains a decoder on text, scores it on validation text, and samples from it.

    Call it again with the same settings to resume an interrupted run; see
    `TrainConfig.resume`.

    Args:
      name: of the run.
      model: the decoder.
      data: the text, or the examples.
      mesh: of the devices.
      strategy: what is sharded over which axis.
      optimizer: an optax chain for `loop.steps` updates.
      loop: how long the run is, what it reports and keeps, and how long the sample is.
      record: settings as plain values; the first row of the metrics file, and in checkpoints.
      lora: adapters, which alone are trained.
      pretrained: weights that a new run starts from, and how exports are written.
      compiling: keywords of `compile_step`: `mode`, `compiler_options`, `on_nonfinite`, ….
      cache: folder that keeps what is compiled; `"auto"`: `.compiled` beside the run's,
        but for several simulated CPU devices; `"off"`.
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
    folder = Path(loop.out).expanduser() if loop.out else Path("runs") / name
    auto = folder.parent / ".compiled" if can_keep_programs(mesh) else None
    beside = {"auto": auto, "off": None}
    kept = beside[cache] if cache in beside else Path(cache).expanduser()
    tuning = Tuning(model, lora, pretrained, loop)
    tuning.check()
    spec = declare_run(model, data, strategy, optimizer, lora=lora, **(compiling or {}))
    source = load_source(data, model.vocab)
    show_mesh(console, mesh)
    console.print(label_text("data", f" {source.describe()}"), soft_wrap=True)

    @functools.cache
    def compile_once() -> CompiledStep:
        return spec.compile(mesh, cache=kept)

    def evaluate(step: Any, state: Any) -> Mapping[str, float]:
        batches = spread_batches(source, loop.eval_batches)
        return TextScores.of(step, state, source, batches).metrics

    summary = Summary(Sampler(tuning, source, strategy), source, loop, console)
    Trainer(
        compile_once,
        Loader(source, lambda: compile_once().batch_shardings, prefetch=data.prefetch),
        folder,
        loop,
        evaluate=evaluate,
        callbacks=[*tuning.callbacks(), summary],
        record=record,
        decides=_DECIDES,
        tokens=data.batch_size * data.seq_len,
        describe=functools.partial(describe_text_metrics, unit=source.unit),
        console=console,
        load_params=tuning.loader(spec, mesh),
        process_group=process_group,
    ).run()
    assert summary.result is not None  # only a callback could have ended the run before
    where = summary.result.folder / "metrics.jsonl"
    console.print(ConsoleText(f"Metrics: {where}"), soft_wrap=True)
    return summary.result
