"""`TextTrainConfig`: the loop of `shardkit train`, with its evaluation and its sample."""

import dataclasses

from .._core.errors import Problem
from ..run import TrainConfig


@dataclasses.dataclass(frozen=True)
class TextTrainConfig(TrainConfig):
    """The loop of a run on text, which ends with a score on the whole validation text.

    >>> TextTrainConfig(steps=20, sample=0)  # doctest: +ELLIPSIS
    TextTrainConfig(steps=20, seed=0, ..., sample=0, ..., out=None)

    Attributes:
      eval_batches: validation batches per evaluation during training.
      sample: number of tokens to sample at the end; 0 for none. Without a tokenizer a token is a
        byte.
      temperature: of the sample; lower is more deterministic.
      baselines: whether to measure gzip, xz and n-gram counts on the validation text.
      export: folder for the weights at the end, as a Hugging Face folder like `model.weights`,
        with the adapters merged into them; None for none.
      export_adapter: folder for the adapters alone, as PEFT writes them; None for none.
      out: folder of the run; None for `runs/<name>`. An existing folder is never written to: a
        new run gets the next free number behind its name.
    """

    eval_batches: int = 4
    sample: int = 300
    temperature: float = 0.7
    baselines: bool = True
    export: str | None = None
    export_adapter: str | None = None
    out: str | None = None

    def _problems(self) -> list[Problem]:
        problems = super()._problems() + self._check_least({"eval_batches": 1, "sample": 0})
        problems += self._check_paths("out", "export", "export_adapter")
        if self.temperature <= 0:
            why, fix = "must be positive.", "--set train.temperature=0.7"
            problems.append(Problem(f"train.temperature={self.temperature:g}", why, fix))
        return problems
