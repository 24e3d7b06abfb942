"""Every so many updates: do all devices hold the same copy of the state?"""

from typing import Any

import jax

from .._errors import StateError, format_problems
from ..guards import Mismatch, Replicas
from ._config import TrainConfig
from ._watch import Numbers, Run, Watcher


class CheckReplicas(Watcher):
    """Compares checksums of copies, and stops or warns as the config declares.

    The sums are started behind an update and read when its numbers are, so nothing waits.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Takes `replica_check_every` and `on_replica_mismatch`."""
        self._every, self._stops = config.replica_check_every, config.on_replica_mismatch == "stop"
        self._run: Run | None = None
        self._replicas: Replicas | None = None
        self._sums: dict[int, jax.Array] = {}
        self._sound: int | None = None

    def begin(self, run: Run, state: Any) -> None:
        """Looks at how the state is laid out."""
        self._run = run
        replicas = Replicas(state)
        if replicas.leaves:
            self._replicas = replicas
        else:
            run.say("train.replica_check_every: no leaf has a second copy, nothing is compared")

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """Starts summing up where it is time."""
        if self._replicas and step % self._every == 0:
            self._sums[step] = self._replicas.sums(state)

    def read(self, numbers: Numbers) -> None:
        """Reads the sums of an update.

        Raises:
          StateError: copies differ, and the run is to stop then.
        """
        sums = self._sums.pop(numbers.step, None)
        if sums is None or self._replicas is None:
            return
        found = self._replicas.mismatches(sums)
        if found:
            self._tell(numbers.step, found)
        else:
            self._sound = numbers.step

    def _tell(self, step: int, found: tuple[Mismatch, ...]) -> None:
        assert self._run is not None
        rows = [
            {"leaf": one.leaf, "device": str(one.device), "place": dict(one.place)}
            | {"checksum": one.checksum, "expected": one.expected}
            for one in found
        ]
        self._run.write("replicas", step=step, differ=rows)
        sound = f"after step {self._sound}" if self._sound else "at the beginning"
        fix = f"go on from a checkpoint not newer than step {self._sound or self._run.start}"
        headline = f"Copies of the state differ at step {step}; they agreed {sound}."
        text = format_problems(headline, [one.problem for one in found], fix)
        if self._stops:
            raise StateError(text)
        self._run.say(f"{text}\nThe run goes on (train.on_replica_mismatch=go_on).")
