"""A compiled step on its mesh, put through everything that the certificate compares."""

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator
from typing import Any

import jax
import optax

from ..step import CompiledStep
from ._layout import declared_specs, differing_copies, misplaced
from ._record import (
    EVALUATE,
    GRADIENTS,
    INIT,
    LATER_STATE,
    OWN_PROGRAM,
    SGD,
    Leaves,
    Record,
    Trial,
    host,
    of_steps,
)

_COMPILES = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@dataclasses.dataclass(frozen=True)
class Observed:
    """What one mesh told.

    Attributes:
      record: numbers, by check.
      misplaced: leaves that live elsewhere than the rules say, as (path, why).
      differing: leaves whose copies differ between devices, as (path, why).
      compiled: programs that the later calls of the step compiled.
      calls: number of those later calls.
    """

    record: Record
    misplaced: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, str], ...]
    compiled: int
    calls: int


def observe(
    step: CompiledStep,
    trial: Trial,
    sgd: optax.GradientTransformation,
    checks: Collection[str] = OWN_PROGRAM,
) -> Observed:
    """Runs a step on its mesh.

    Args:
      step: compiled for the mesh.
      trial: batches, number of steps and key.
      sgd: optimizer of the one SGD update.
      checks: which of the checks that take a compilation of their own to make; the others always.
    """
    state = step.init(trial.key)
    specs = declared_specs(step.declaration, state)
    batch = step.put(trial.batch(0))
    parts = _parts(state)
    wrong = list(misplaced({**parts, "batch": batch}, specs, step.mesh, "at first"))
    record: Record = {INIT: _leaves(state)}
    kept: dict[str, Any] = {}
    if EVALUATE in checks:
        record[EVALUATE] = host(step.evaluate(state, batch))
    if GRADIENTS in checks:
        _, kept["gradients"] = step.gradients(state, batch)
        record[GRADIENTS] = host(kept["gradients"])
    if SGD in checks:
        # Plain SGD keeps no arrays, so the first state is made by the program that is there.
        again = step.init(trial.key)
        again = dataclasses.replace(again, opt_state=sgd.init(again.params))
        after, _ = step.replace(optimizer=sgd)(again, batch)
        kept["sgd params"] = after.params
        record[SGD] = host(after.params)

    state, told, compiled = _steps(step, state, trial)
    wrong += misplaced(_parts(state), specs, step.mesh, "after the last step")
    differing = differing_copies({**kept, **_parts(state)})
    record |= {**of_steps(told), LATER_STATE: _leaves(state)}
    # A leaf that is misplaced at first and at last is one leaf.
    found = tuple(dict(reversed(wrong)).items()), tuple(differing)
    return Observed(record, *found, compiled, trial.steps - 1)


def _steps(step: CompiledStep, state: Any, trial: Trial) -> tuple[Any, list[Any], int]:
    """Makes all updates; returns also what they told and what the later ones compiled."""
    told, compiled = [], 0
    for t in range(trial.steps):
        placed = step.put(trial.batch(t))
        with counted_compiles() as count:
            state, metrics = step(state, placed)
        compiled += count[0] if t else 0
        told.append(metrics)
    return state, told, compiled


@contextlib.contextmanager
def counted_compiles() -> Iterator[list[int]]:
    """Counts the programs that this thread lowers in the block, also where a cache has them."""
    count, thread = [0], threading.get_ident()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        count[0] += event == _COMPILES and threading.get_ident() == thread

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _parts(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _leaves(state: Any) -> Leaves:
    """Leaves of a `TrainState` that the reference has too."""
    return {
        path: x
        for part in ("params", "opt_state", "extra")
        for path, x in host(getattr(state, part), part).items()
    }
