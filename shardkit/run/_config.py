"""How long a run is and what it says on the way."""

import dataclasses

from .._errors import ConfigError, Problem, raise_all


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: updates.
      seed: of the parameters and of dropout; the order of the data has its own.
      eval_every: updates between evaluations on `eval_batches` held-out batches; 0 for none.
        The last one, on all held-out bytes, is always made.
      eval_batches: batches of an evaluation on the way.
      log_every: updates between two printed lines where the output is no terminal.
      sample: bytes that the trained model writes at the end; 0 for none.
      temperature: of the sample; lower is more certain.
      baselines: whether to measure gzip, xz and counting on the held-out bytes.
      out: folder of the run; None for `runs/<name>`. A folder that exists is never written
        to: the run gets the next free number behind its name.
    """

    steps: int = 400
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 4
    log_every: int = 20
    sample: int = 300
    temperature: float = 0.7
    baselines: bool = True
    out: str | None = None

    def __post_init__(self) -> None:
        """Refuses counts that no loop has."""
        least = {"steps": 1, "eval_every": 0, "eval_batches": 1, "log_every": 1, "sample": 0}
        problems = [
            Problem(
                f"train.{name}={value}", f"must be at least {low}.", f"--set train.{name}={low}"
            )
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]
        if self.temperature <= 0:
            why = "must be positive."
            fix = "--set train.temperature=0.7"
            problems.append(Problem(f"train.temperature={self.temperature:g}", why, fix))
        raise_all(ConfigError, "The loop cannot run this way.", problems)
