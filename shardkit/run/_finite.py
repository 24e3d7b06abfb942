"""A run whose numbers are not finite has diverged, and ends."""

import math

from .._errors import Problem, StepError, format_problems
from ._watch import Numbers, Watcher


class StopAtNonFinite(Watcher):
    """Ends the run at the first metric that is not finite."""

    def read(self, numbers: Numbers) -> None:
        """Looks at every metric.

        Raises:
          StepError: naming the step and the metrics.
        """
        bad = {name: x for name, x in numbers.values.items() if not math.isfinite(x)}
        if bad:
            named = ", ".join(f"{name} is {value}" for name, value in bad.items())
            fix = "a lower learning rate (optimizer.lr=...), or clipping (optimizer.clip=1.0)"
            problem = Problem(f"step {numbers.step}", named, fix)
            raise StepError(format_problems("The run has diverged.", [problem]))
