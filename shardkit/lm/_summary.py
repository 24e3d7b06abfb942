"""The end of a run on text: its score beside compressors, and a sample."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text as ConsoleText

from .._core.io._console import print_table, show_task
from .._core.io._table import Column, Table
from ..data import Baselines, Corpus, ScoredSource, Text, measure_baselines
from ..run import label_text
from ..run.callbacks import Callback, RunContext
from ._config import TextTrainConfig
from ._sample import printable
from ._samples import Sampler
from ._scores import TextScores

_NO_TEXT = (
    "no sample: decoding the tokens needs the tokenizer that made the shards "
    "(--set data.tokenizer=tokenizer.json)"
)
_NO_PROMPTS = "no sample: no validation example has a prompt that leaves room for an answer"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run on text.

    Attributes:
      folder: of the run.
      bits_per_byte: over the whole validation text; None if only tokens are known.
      scores: the same per token.
      baselines: compressors on the same bytes, or None if not requested.
      sample: text that the model generated; not necessarily valid UTF-8.
      seconds: wall time by part: `train`, `evaluate`, `baselines`, `sample`.
    """

    folder: Path
    bits_per_byte: float | None
    scores: TextScores
    baselines: Baselines | None
    sample: bytes
    seconds: Mapping[str, float]


class Summary(Callback):
    """Scores the last state on the whole validation text, beside compressors, and samples."""

    def __init__(
        self, sampler: Sampler, text: ScoredSource, config: TextTrainConfig, console: Console
    ) -> None:
        """Declares what is scored; the config says if compressors are measured and a text drawn."""
        self.result: TrainResult | None = None  # before the run has finished
        self._sampler, self._text, self._config = sampler, text, config
        self._console = console

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run, self._seconds, self._mark = run, dict[str, float](), time.perf_counter()

    def on_finish(self, state: Any) -> None:
        """Scores, samples, prints, and writes the `eval` and `result` rows."""
        run, text, config = self._run, self._text, self._config
        self._finish_part("train")
        with show_task(self._console, f"scoring {text.validation_steps} batches"):
            scores = TextScores.of(run.step, state, text, range(text.validation_steps))
        seconds = self._finish_part("evaluate")
        run.write("eval", step=config.steps, **scores.metrics, seconds=seconds, part="all")
        baselines = None
        corpus = text.corpus if isinstance(text, Text) else None
        if config.baselines and isinstance(corpus, Corpus):
            with show_task(self._console, "compressing the same bytes for comparison"):
                baselines = measure_baselines(corpus)
            run.write("baselines", seconds=self._finish_part("baselines"))
        _show_scores(self._console, scores, config.steps, baselines)
        with show_task(self._console, "sampling") if config.sample else contextlib.nullcontext():
            sample = self._sampler.draw(run.step, state.params)
        seconds = self._finish_part("sample")
        if sample:
            run.write("sample", seconds=seconds)
            self._console.print("\n[bold]a sample that it wrote[/]")
            for line in printable(sample).splitlines():
                self._console.print(ConsoleText(f"  {line}"))
        elif config.sample:
            run.say(_NO_TEXT if isinstance(text, Text) else _NO_PROMPTS)
        run.write(
            "result",
            **scores.metrics,
            baselines=dataclasses.asdict(baselines) if baselines else None,
            sample=printable(sample),
            seconds_by_part=self._seconds,
        )
        self.result = TrainResult(
            folder=run.folder,
            bits_per_byte=scores.bits_per_byte,
            scores=scores,
            baselines=baselines,
            sample=sample,
            seconds=self._seconds,
        )

    def _finish_part(self, part: str) -> float:
        """Returns the seconds since the part before, and keeps them under a name."""
        now = time.perf_counter()
        self._seconds[part], self._mark = now - self._mark, now
        return self._seconds[part]


def _show_scores(
    console: Console, scores: TextScores, steps: int, baselines: Baselines | None
) -> None:
    """Prints the model, after `steps` updates, among the compressors, best first."""
    unit, bits = scores.shown
    rows: list[tuple[str, str, float]] = [("this model", f"{steps} steps", bits)]
    if baselines is not None:
        rows += [
            ("order-0", "byte frequencies of the training text", baselines.order0),
            ("bigram", "frequencies given the byte before", baselines.bigram),
            ("gzip -9", "the validation bytes alone", baselines.gzip),
            ("xz -9", "the validation bytes alone", baselines.xz),
            ("xz -9 after train", "what they add to the training text", baselines.xz_after_train),
        ]
    rows.sort(key=lambda row: row[2])
    cells = [(f"{value:.3f}", name, knows) for name, knows, value in rows]
    own = [at for at, row in enumerate(rows) if row[0] == "this model"]
    columns = (Column(f"bits per {unit}", right=True), "coder", "knows")
    scored = f"{scores.scored:,} {scores.unit}s"
    console.print(label_text("\nvalidation", f": {scored}, each scored once"))
    print_table(console, Table(columns, cells, styles=dict.fromkeys(own, "bold green")))
