"""Runs a compiled step on its mesh and records everything that the parity report compares."""

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator
from typing import Any

import jax
import optax

from .._core.train_state import TrainState
from .._core.types import PyTree
from ..step import CompiledStep
from ._layout import find_differing_copies, find_misplaced_leaves, resolve_declared_specs
from ._record import (
    COUNTERS,
    EVALUATE,
    GRADIENTS,
    INIT,
    LATER_EVALUATE,
    LATER_STATE,
    OWN_PROGRAM,
    SGD,
    ParityInputs,
    Record,
    copy_state_to_host,
    copy_to_host,
    group_metrics_by_check,
    select_counters,
)

_COMPILES = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a step computed on one mesh."""

    record: Record  # arrays by check
    # (path, why) of leaves that are not where the rules put them
    misplaced_leaves: tuple[tuple[str, str], ...]
    # (path, why) of leaves whose copies differ between devices
    differing_copies: tuple[tuple[str, str], ...]
    later_calls: int  # calls of the step after the first
    later_compiles: int  # programs that these calls compiled


def observe(
    step: CompiledStep,
    inputs: ParityInputs,
    sgd: optax.GradientTransformation,
    checks: Collection[str] = OWN_PROGRAM,
) -> Observation:
    """Runs a step on its mesh, with `sgd` for the one SGD update.

    Of the checks that compile a program of their own, only `checks` run; the others always do.
    """
    state = step.init(inputs.key)
    specs = resolve_declared_specs(step.spec, step.mesh, state)
    batch = step.shard_batch(inputs.batch(0))
    at_first = {**state_fields(state), "batch": batch}
    misplaced = list(find_misplaced_leaves(at_first, specs, step.mesh, "at first"))
    record: Record = {INIT: copy_state_to_host(state)}
    outputs: dict[str, Any] = {}
    evaluates = EVALUATE in checks or LATER_EVALUATE in checks
    if evaluates:
        record[EVALUATE] = copy_to_host(step.evaluate(state, batch))
    if GRADIENTS in checks:
        _, outputs["gradients"] = step.gradients(state, batch)
        record[GRADIENTS] = copy_to_host(outputs["gradients"])
    if SGD in checks:
        # Plain SGD has no state arrays: the compiled init program gives the parameters.
        start = step.init(inputs.key)
        start = dataclasses.replace(
            start, opt_state=sgd.init(step.layout.partition.trained(start.params))
        )
        after, _ = step.replace(optimizer=sgd)(start, batch)
        outputs["sgd params"] = after.params
        record[SGD] = copy_to_host(after.params)

    state, metrics, later_compiles = _run_steps(step, state, inputs)
    at_last = state_fields(state)
    misplaced += find_misplaced_leaves(at_last, specs, step.mesh, "after the last step")
    record |= {**group_metrics_by_check(metrics), LATER_STATE: copy_state_to_host(state)}
    own = {"step": state.step, "halted": state.halted, "key": state.key}
    record[COUNTERS] = {**copy_to_host(own), **select_counters(record[LATER_STATE])}
    if evaluates:
        record[LATER_EVALUATE] = copy_to_host(step.evaluate(state, batch))
    return Observation(
        record,
        # One row per path: a leaf that is misplaced at first and at last counts once, as at first.
        misplaced_leaves=tuple(dict(reversed(misplaced)).items()),
        differing_copies=tuple(find_differing_copies({**outputs, **at_last})),
        later_calls=inputs.steps - 1,
        later_compiles=later_compiles,
    )


def _run_steps(
    step: CompiledStep, state: TrainState, inputs: ParityInputs
) -> tuple[TrainState, list[dict[str, jax.Array]], int]:
    """Returns the last state, the metrics of each step, and what steps after the first compiled."""
    all_metrics, later_compiles = [], 0
    for t in range(inputs.steps):
        batch = step.shard_batch(inputs.batch(t))
        with count_compiles() as compiles:
            state, metrics = step(state, batch)
        later_compiles += compiles[0] if t else 0
        all_metrics.append(metrics)
    return state, all_metrics, later_compiles


@contextlib.contextmanager
def count_compiles() -> Iterator[list[int]]:
    """Counts the programs that this thread lowers in the block, compiled or found in a cache."""
    compiles, thread = [0], threading.get_ident()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiles[0] += event == _COMPILES and threading.get_ident() == thread

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def state_fields(state: TrainState) -> dict[str, PyTree]:
    """The fields of a state by name, without copying their arrays."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
