"""What `shardkit train` declares beside the loop: how text is scored, and what is written."""

import dataclasses

from .._errors import Problem
from ._config import TrainConfig


@dataclasses.dataclass(frozen=True)
class TextTrainConfig(TrainConfig):
    """The loop of a run on text, which ends with a score on all that is held out.

    >>> TextTrainConfig(steps=20, sample=0)  # doctest: +ELLIPSIS
    TextTrainConfig(steps=20, seed=0, ..., sample=0, temperature=0.7, baselines=True, out=None)

    Attributes:
      eval_batches: held-out batches of an evaluation on the way.
      sample: tokens that the trained model writes at the end; 0 for none. A token is a byte where
        there is no tokenizer.
      temperature: of the sample; lower is more certain.
      baselines: whether to measure gzip, xz and counting on the held-out bytes.
      out: folder of the run; None for `runs/<name>`. A folder that exists is never written
        to: the run gets the next free number behind its name.
    """

    eval_batches: int = 4
    sample: int = 300
    temperature: float = 0.7
    baselines: bool = True
    out: str | None = None

    def _problems(self) -> list[Problem]:
        problems = super()._problems() + self._too_small({"eval_batches": 1, "sample": 0})
        if self.temperature <= 0:
            why, fix = "must be positive.", "--set train.temperature=0.7"
            problems.append(Problem(f"train.temperature={self.temperature:g}", why, fix))
        return problems
