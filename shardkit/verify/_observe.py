"""A compiled step on its mesh, put through everything that the certificate compares."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax

from ..step import CompiledStep
from ._layout import declared_specs, differing_copies, misplaced
from ._record import Leaves, Record, Trial, as_record, host

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


def observe(step: CompiledStep, trial: Trial, sgd: optax.GradientTransformation) -> Observed:
    """Runs a step on its mesh.

    Args:
      step: compiled for the mesh.
      trial: batches, number of steps and key.
      sgd: optimizer of the one SGD update.
    """
    state = step.init(trial.key)
    specs = declared_specs(step.declaration, state)
    batch = step.put(trial.batch(0))
    wrong = [*misplaced(_parts(state), specs, step.mesh, "at first")]
    wrong += misplaced({"batch": batch}, specs, step.mesh, "at first")
    init = _leaves(state)
    of_gradients, grads = step.gradients(state, batch)
    evaluated = step.evaluate(state, batch)

    # A new optimizer's state cannot be the donated one's; SGD starts from the same key anew.
    simple = step.replace(optimizer=sgd)
    after, _ = simple(simple.init(trial.key), batch)

    told, compiled = [], 0
    for t in range(trial.steps):
        placed = step.put(trial.batch(t))
        with counted_compiles() as count:
            state, metrics = step(state, placed)
        compiled += count[0] if t else 0
        told.append(metrics)
    wrong += misplaced(_parts(state), specs, step.mesh, "after the last step")
    differing = {
        **dict(differing_copies({"gradients": grads})),
        **dict(differing_copies({"sgd params": after.params})),
        **dict(differing_copies(_parts(state))),
    }
    record = as_record(init, told, of_gradients, grads, evaluated, after.params, _leaves(state))
    return Observed(
        record, tuple(wrong), tuple(differing.items()), compiled, max(0, trial.steps - 1)
    )


@contextlib.contextmanager
def counted_compiles() -> Iterator[list[int]]:
    """Counts the programs that JAX lowers within the block, also those a cache then supplies."""
    count = [0]

    def listen(event: str, seconds: float, **_: Any) -> None:
        count[0] += event == _COMPILES

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
