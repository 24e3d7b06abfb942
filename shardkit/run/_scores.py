"""What a run comes to: a score on held-out text, beside compressors, and a sample."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ..adapters import Model
from ..data import Baselines, Corpus, Text, measure_baselines
from . import _console as show
from ._sample import printable, sample_tokens
from ._text import Scores
from ._text_config import TextTrainConfig
from ._watch import Run, Watcher

_NO_TEXT = (
    "no sample: tokens of shards have no text without the tokenizer that made them "
    "(--set data.tokenizer=tokenizer.json)"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      folder: where its files are.
      bits_per_byte: over all held-out bytes; None where only tokens are known.
      scores: the same by token.
      baselines: compressors on the same bytes, or None where they were not asked for.
      sample: text that the model wrote; it need not be UTF-8.
      seconds: wall time by part: `train`, `evaluate`, `baselines`, `sample`.
    """

    folder: Path
    bits_per_byte: float | None
    scores: Scores
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


class Score(Watcher):
    """Scores a trained state on all held-out bytes, shows it among compressors, and samples.

    Attributes:
      result: once the run has finished.
    """

    def __init__(
        self, adapter: Model, text: Text, config: TextTrainConfig, console: Console
    ) -> None:
        """Declares what is scored, and what with.

        Args:
          adapter: of the model, which is to write.
          text: with its held-out bytes.
          config: whether compressors are asked, and how long the sample is.
          console: where the scores are shown.
        """
        self.result: Result | None = None
        self._adapter, self._text, self._config = adapter, text, config
        self._console, self._timer = console, Timer()

    def begin(self, run: Run, state: Any) -> None:
        """Begins to count the time."""
        self._run, self._timer = run, Timer()

    def finished(self, state: Any) -> None:
        """Scores, shows and writes."""
        run, text, config, timer = self._run, self._text, self._config, self._timer
        timer.lap("train")
        scores = Scores.of(run.step, state, text, range(text.held_out_steps))
        spent = {"seconds": timer.lap("evaluate"), "part": "all"}
        run.write("eval", step=config.steps, **scores.metrics, **spent)
        baselines = None
        if config.baselines and isinstance(text.corpus, Corpus):
            baselines = measure_baselines(text.corpus)
            timer.lap("baselines")
        scored = f"{scores.scored:,} {scores.unit}s"
        show.show_scores(self._console, scores.shown, scored, config.steps, baselines)
        sample = _sample(self._adapter, state.params, text, config)
        timer.lap("sample")
        if sample:
            show.show_sample(self._console, printable(sample).splitlines())
        elif config.sample and text.decoder is None:
            run.say(_NO_TEXT)
        run.write(
            "result",
            **scores.metrics,
            baselines=dataclasses.asdict(baselines) if baselines else None,
            sample=printable(sample),
            seconds_by_part=timer.seconds,
        )
        self.result = Result(
            run.folder, scores.bits_per_byte, scores, baselines, sample, timer.seconds
        )


def _sample(adapter: Model, params: Any, text: Text, loop: TextTrainConfig) -> bytes:
    """What the model writes behind the end of a document; nothing where no token has a text."""

    def next_token(params: Any, row: jax.Array, at: jax.Array) -> jax.Array:
        model = adapter.bind(params)
        return model.logits(model(row)[0, at])

    coder = text.decoder
    if not loop.sample or coder is None:
        return b""
    drawn = sample_tokens(
        next_token,
        params,
        [text.train.end or 0],
        count=loop.sample,
        window=text.config.seq_len,
        vocabulary=coder.vocabulary,
        temperature=loop.temperature,
        key=jax.random.fold_in(jax.random.key(loop.seed), loop.steps),
    )
    return coder.decode(drawn)
