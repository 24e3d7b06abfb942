"""`sk.plan`: which mesh for this model on these devices?"""

import time
from collections.abc import Sequence
from typing import NoReturn

from .._core.errors import MeshError, Problem, format_problems, raise_all
from .._core.options import check_arguments
from .._core.row_dims import count_rows, set_rows
from .._core.tree import format_bytes, list_leaves
from ..hardware import CHIPS, Chip
from ..mesh import Target
from ..parallel import Strategy, planned_kinds
from ..step import StepSpec, check_step_spec, list_row_dims
from ._candidate import Candidate
from ._estimate import Machine
from ._result import Plan, pareto_front
from ._search import Search, SearchResult
from ._sensitivity import describe_batch_crossover, describe_more_memory, find_sensitivity
from ._space import SearchSpace, searched_axes


def raise_no_layout(target: Target, result: SearchResult, tight: Sequence[Candidate]) -> NoReturn:
    """Raises MeshError: why no layout is left, and the smallest change that helps."""
    problems = [
        Problem(example, f"{n} layouts: {why}") for why, (n, example) in result.rejected.items()
    ]
    fix = "another number of devices, or a global batch that they divide"
    if tight:
        smallest = min(tight, key=lambda c: c.total)
        capacity, missing = format_bytes(smallest.capacity), format_bytes(-smallest.margin)
        why = f"the smallest of {len(tight)} needs {format_bytes(smallest.total)} of {capacity}"
        problems.insert(0, Problem(str(smallest), f"{why}: {missing} are missing"))
        larger = [c for c in CHIPS.values() if c.memory >= smallest.total and c.kind == target.kind]
        fix = f"a device with {missing} more"
        if larger:
            fix += f", as {min(larger, key=lambda c: c.memory).name}"
        part = "state" if smallest.state > smallest.temp else "activations"
        fix += f"; or twice the devices, as {part} take most"
        fix += "" if part == "state" else "; or a smaller global batch, or more micro-batches"
    headline = f"No layout fits on {target}."
    raise MeshError(format_problems(headline, problems, fix))


def describe_kinds(strategy: Strategy, axes: Sequence[str]) -> str:
    """The kinds of parallelism that were weighed, and those of the spec that were not."""
    weighed = planned_kinds()
    kinds = [kind.planned for axis in axes for kind in weighed if kind.axis == axis]
    others = [kind.planned for kind in weighed if kind.axis not in axes]
    others += [variant for kind in weighed for variant in kind.not_planned]
    others += [str(kind) for kind in strategy.kinds if kind.unmodelled_reason]
    return f"layouts are {', '.join(kinds)}; not weighed: {', '.join(others)}"


def describe_machine(machine: Machine) -> tuple[str, ...]:
    """The assumptions of the estimates about the devices."""
    chip = machine.network.chip
    return (
        f"products at {machine.peak / 1e12:.4g} TFLOP/s, memory at "
        f"{chip.memory_bandwidth / 1e9:.0f} GB/s: the peaks of {chip.name}",
        "operations reach "
        + (
            f"{machine.efficiency:.0%} and {machine.memory_efficiency:.0%} of these, as the "
            f"compiler's estimates do; products fill tiles of {chip.tile}"
            if machine.efficiency < 1
            else "all of these, as nothing is fitted for this kind of device"
        ),
        f"links {chip.link / 1e9:.0f} GB/s one way, {chip.latency * 1e6:.0f} µs per hop",
        f"{machine.overlap:.0%} of communication is hidden behind compute",
        "elementwise operations are fused into those that read them",
    )


_FAILED = "No plan was made."


def plan(
    spec: StepSpec,
    target: str,
    *,
    global_batch: int | None = None,
    space: SearchSpace | None = None,
    overlap: float = 0.0,
    hardware: Sequence[Chip] = (),
) -> Plan:
    """Estimates every layout of a model on a target, and ranks those that fit.

    The state is exact: rules are resolved on every mesh. Activations, FLOPs and collectives come
    from the traced loss, whose dims are followed by their logical axes. This works for any model
    that names the dims of its parameters or activations, and for others over `data` and `fsdp`.

    Args:
      spec: loss, optimizer, init, batch and precision; its strategy is not used.
      target: `tpu:v5p:8x8x8`, `gpu:h100:4x8`: devices of the hardware table, or of `hardware`.
      global_batch: rows of the batch, instead of the spec's.
      space: the options to try; all of them by default.
      overlap: share of communication that compute hides. The default, 0, is what the TPU compiler
        achieves for everything but permutes.
      hardware: your own chips, which `target` can name too.

    Returns:
      The plan. Its figures are modelled.

    Raises:
      MeshError: `spec` is not a `StepSpec`, a number is out of range, the batch has no rows, the
        target is not a known device, no layout is legal, or none fits; with the reason of each
        that was left out, and the smallest change that fits.

    >>> import jax, jax.numpy as jnp, optax, shardkit as sk
    >>> spec = sk.StepSpec(
    ...     loss_fn=lambda w, x, key: jnp.mean((x @ w) ** 2), optimizer=optax.sgd(0.1),
    ...     init=lambda key: jnp.zeros((64, 64)), batch=jax.ShapeDtypeStruct((8, 64), "float32"),
    ...     strategy=sk.strategies.data())
    >>> planned = plan(spec, "tpu:v5e:2x2", space=SearchSpace(axes=("data",)))
    >>> dict(planned.best.mesh)
    {'data': 4}
    """
    start = time.monotonic()
    check_step_spec(spec, MeshError, _FAILED)
    check_arguments(
        MeshError,
        _FAILED,
        target=(target, str),
        global_batch=(global_batch, int | None),
        space=(space, SearchSpace | None),
        overlap=(overlap, float),
        hardware=(hardware, Sequence[Chip]),
    )
    _check_numbers(global_batch, overlap)
    devices, spec = _parse_target(target, hardware), _with_rows(spec, global_batch)
    search = Search.of(spec, devices, space or SearchSpace(), overlap, hardware)
    if space is None and search.has_experts:
        search.space = SearchSpace(searched_axes(experts=True))
    result = search.run()
    by_time = sorted(result.candidates, key=lambda c: c.seconds)
    rows = [c for c in by_time if c.margin >= 0]
    tight = [c for c in by_time if c.margin < 0]
    if not rows:
        raise_no_layout(devices, result, tight)
    took = time.monotonic() - start
    winners, no_winner = find_sensitivity(search, pareto_front([*rows, *tight]))
    changes = (*describe_more_memory(rows[0], tight), *describe_batch_crossover(search, rows[0]))
    weighed = describe_kinds(spec.strategy, search.space.axes)
    return Plan(
        target=str(devices),
        rows=tuple(rows),
        tight=tuple(tight),
        rejected=result.rejected,
        considered=result.considered,
        took=took,
        changes=(*changes, *no_winner),
        sensitivity=winners,
        assumptions=(*describe_machine(search.machine), weighed),
        problems=result.problems,
    )


def _check_numbers(rows: int | None, overlap: float) -> None:
    problems = []
    if rows is not None and rows < 1:
        problems.append(Problem(f"global_batch={rows}", "is not positive", "global_batch=128"))
    if not 0 <= overlap <= 1:
        why = "is not a share of communication, between 0 and 1"
        problems.append(Problem(f"overlap={overlap:g}", why, "overlap=0.5"))
    raise_all(MeshError, _FAILED, problems)


def _parse_target(target: str, hardware: Sequence[Chip]) -> Target:
    parsed = Target.parse(target, hardware)
    if not parsed.chip:
        problem = Problem(target, "the hardware table does not have the speed of these devices")
        fix = f"one of {', '.join(CHIPS)}: tpu:v5p:4x4x4, gpu:h100:1x8"
        raise MeshError(format_problems(_FAILED, [problem], fix))
    return parsed


def _with_rows(spec: StepSpec, rows: int | None) -> StepSpec:
    dims = list_row_dims(list_leaves(spec.batch), spec.row_dims)
    now, problems = count_rows(spec.batch, dims), []
    if rows is None:
        if now == {0}:
            problems = [Problem("batch", "has 0 rows, which take no time", "global_batch=128")]
    elif len(now) != 1:
        what = f"leaves have {', '.join(map(str, sorted(now)))} rows" if now else "no leaf has rows"
        fix = 'StepSpec(row_dims={"class_weights": None, "**": 0})'
        problems = [Problem("batch", f"{what}, so global_batch={rows} sets none", fix)]
    raise_all(MeshError, _FAILED, problems)
    return spec if rows is None else spec.replace(batch=set_rows(spec.batch, dims, rows))
