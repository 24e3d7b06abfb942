"""Memory and time of pipelines, from the symbolic costs of the program that they execute.

The costs say what one micro-batch takes before, in and after the layers; the tick table says which
stage does which of it when. A tick lasts as long as the longest of its stages' work, since all
stages wait for the exchange after it:

    GPipe, 2 stages, 2 micro-batches; F forward and B backward, with the number of the micro-batch

    tick      0   1   2   3   4   5     tick 4 lasts as long as the longer of both backward passes
    stage 0   F0  F1          B0  B1
    stage 1               B0  B1        the last stage computes F within B
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from .._core.types import Accumulate
from ..parallel import Branch, TickProgram, gradient_shard_axes, schedule, tick_program
from ._costs import PHASES, PIPE, Collective
from ._estimate import Estimates, Machine, ShardCounts, compute_seconds, cost_collectives
from ._space import PipelineOptions
from ._state_bytes import StateBytes
from ._symbolic_sharding import count_shards
from ._trace import StepCosts

_SUMS = ("all-reduce", "reduce-scatter")
_PROLOGUE, _FORWARD, _EPILOGUE, _BACKWARD, _PROLOGUE_BACKWARD = range(len(PHASES))
_BY_AXES = dict[tuple[str, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TickRoles:
    """A tick table as the distinct roles that stages have in a tick."""

    shares: np.ndarray  # f64[roles, phases], share of each phase of the program that a role runs
    at_once: Mapping[frozenset[int], int]  # the roles of a tick → number of ticks with just these
    mean: np.ndarray  # f64[phases], executions of each phase by a stage, on the average
    exchanges: int  # ticks after which something is sent
    messages: float  # that one stage sends, on the average
    slots: int  # messages that a stage keeps at once


@functools.lru_cache(maxsize=256)
def read_tick_roles(pipeline: PipelineOptions, stages: int) -> TickRoles:
    """Reads a schedule's tick table.

    >>> roles = read_tick_roles(PipelineOptions("gpipe", 4), 2)
    >>> roles.mean.tolist()  # the last stage computes its forward pass within its backward pass
    [4.0, 6.0, 2.0, 4.0, 2.0]
    >>> roles.slots, roles.messages
    (6, 8.0)
    """
    table = schedule(
        pipeline.schedule,
        stages=stages,
        micro_batches=pipeline.micro_batches,
        virtual_stages=pipeline.virtual_stages,
    )
    plan: TickProgram = tick_program(table)
    branches = np.stack([plan.columns[name] for name in ("branch", "first", "last")], -1)
    distinct, inverse = np.unique(branches.reshape(-1, 3), axis=0, return_inverse=True)
    roles = inverse.reshape(branches.shape[:2])  # i64[ticks, stages], rows of `distinct`
    virtual = pipeline.virtual_stages
    shares = np.array(
        [_phase_shares(branch, first, last, virtual) for branch, first, last in distinct.tolist()]
    )
    at_once: dict[frozenset[int], int] = {}
    for tick in map(frozenset, roles):
        at_once[tick] = at_once.get(tick, 0) + 1
    ticks_of_role = np.bincount(roles.ravel(), minlength=len(distinct)) / stages
    sizes = [sum(map(len, exchange)) for exchange in plan.exchanges]
    return TickRoles(
        shares=shares,
        at_once=at_once,
        mean=ticks_of_role @ shares,
        exchanges=sum(sizes[number] > 0 for number in plan.exchange),
        messages=plan.messages() / stages,
        slots=plan.slots + 1,
    )


def _phase_shares(branch: int, first: int, last: int, virtual: int) -> list[float]:
    """Share of each phase that a stage executes in one tick.

    The last of 2 virtual stages, going backward: half of the layers forward again and backward,
    and the whole epilogue: `[0, 0.5, 1, 0.5, 0]`.
    """
    share = [0.0] * len(PHASES)
    if branch == Branch.IDLE:
        return share
    share[_FORWARD] = 1 / virtual  # a backward pass recomputes its forward pass
    if branch == Branch.FORWARD:
        share[_PROLOGUE] = float(first)
        return share
    share[_BACKWARD] = (1.0 if branch == Branch.BACKWARD else 0.5) / virtual
    if branch != Branch.WEIGHT:
        share[_PROLOGUE] = share[_PROLOGUE_BACKWARD] = float(first)
        share[_EPILOGUE] = float(last)
    return share


def estimate_stages(
    costs: StepCosts,
    cases: Sequence[tuple[Mapping[str, int], PipelineOptions]],
    exact: Sequence[StateBytes],
    machine: Machine,
    batch_scale: float = 1.0,
) -> tuple[Estimates, np.ndarray]:
    """Evaluates the costs of a step on every mesh with its pipeline, all of them at once.

    They are as if the batch had `batch_scale` times its rows. Returns the estimates, and the
    seconds in which a stage waits for others: f64[cases].
    """
    batchings = [(sizes, Accumulate(p.micro_batches)) for sizes, p in cases]
    shards = ShardCounts(batchings, batch_scale)
    roles = [read_tick_roles(pipeline, sizes[PIPE]) for sizes, pipeline in cases]
    mean = np.array([r.mean for r in roles]).T  # [phases, cases]
    compute, memory = compute_seconds(costs, shards, machine)
    in_ticks, wire, links = _cost_collectives(costs, shards, mean, machine)
    # Seconds of each phase of one micro-batch, what it sends included: f64[phases, cases].
    busy = compute + memory + (1 - machine.overlap) * in_ticks
    # Two micro-batches that a stage computes in 3 s each, in 4 ticks of 3 s: 12 − 6 = 6 s waited.
    waits = np.array(
        [_schedule_seconds(r, busy[:, i]) - r.mean @ busy[:, i] for i, r in enumerate(roles)]
    )
    message = shards.bytes_of([costs.log.message])[0]
    _add_exchanges(roles, exact, message, shards, machine, wire=wire, links=links)
    temp = shards.bytes_of(costs.live_bytes).max(axis=0)
    temp = temp + np.array([r.slots for r in roles]) * message
    temp = temp + np.array([_accumulated_bytes(e, machine.width) for e in exact])
    estimates = Estimates(
        temp=temp,
        compute=(mean * compute).sum(0),
        memory=(mean * memory).sum(0),
        wire=wire,
        communication=links,
    )
    return estimates, waits


def _cost_collectives(
    costs: StepCosts, shards: ShardCounts, mean: np.ndarray, machine: Machine
) -> tuple[np.ndarray, _BY_AXES, _BY_AXES]:
    """Collectives within ticks by phase, in seconds; and wire bytes and seconds of all, by axes."""
    in_ticks: _BY_AXES = {}
    wire: _BY_AXES = {}
    links: _BY_AXES = {}
    none = np.zeros(mean.shape)
    for collective, sent, seconds in cost_collectives(costs, shards, machine):
        name = tuple(axis for axis in shards.cases[0][0] if axis in collective.axes)
        site = collective.site
        times = site.trips * shards.shares([site.loops])[0]
        if _sums_gradients(collective):
            # Once per step: gradients of layers accumulate on their stage; those outside of the
            # stages are in `_add_exchanges`.
            times = times * (PIPE in site.loops)
        elif collective.is_param:
            # Once per step too: gathered before the ticks, and not again for the backward pass.
            times = times * (site.phase in (_PROLOGUE, _FORWARD, _EPILOGUE))
        else:
            in_ticks.setdefault(name, none.copy())[site.phase] += times * seconds
            times = times * mean[site.phase]
        wire[name] = wire.get(name, 0.0) + times * sent
        links[name] = links.get(name, 0.0) + times * seconds
    return sum(in_ticks.values(), none), wire, links


def _sums_gradients(collective: Collective) -> bool:
    over_rows = collective.axes <= frozenset(gradient_shard_axes()) and collective.kind in _SUMS
    return collective.is_gradient or over_rows


def _schedule_seconds(roles: TickRoles, busy: np.ndarray) -> float:
    """Seconds of all ticks, each as long as the longest role in it."""
    seconds = roles.shares @ busy
    return sum(n * max(seconds[role] for role in tick) for tick, n in roles.at_once.items())


def _accumulated_bytes(exact: StateBytes, width: int) -> float:
    """The accumulator of gradients in f32, and weights that are gathered for the whole step."""
    gathered = exact.unreduced if exact.unreduced > exact.reduced else 0
    return exact.unreduced + gathered * width / 4


def _add_exchanges(
    roles: Sequence[TickRoles],
    exact: Sequence[StateBytes],
    message: np.ndarray,
    shards: ShardCounts,
    machine: Machine,
    wire: _BY_AXES,
    links: _BY_AXES,
) -> None:
    """Adds the messages over stage boundaries, and the all-reduce of what every stage holds."""
    network = machine.network
    seconds = message / shards.rate(frozenset({PIPE}), network) + network.chip.latency
    wire[(PIPE,)] = np.array([r.messages for r in roles]) * message
    links[(PIPE,)] = np.array([r.exchanges for r in roles]) * seconds
    # Every stage has gradients of embedding and head, summed once per step in `machine.dtype`.
    axes = tuple(axis for axis in shards.cases[0][0] if axis in (*gradient_shard_axes(), PIPE))
    n = count_shards(axes, shards.sizes)
    sent = 2 * (n - 1) / n * np.array([e.outside_stages * machine.width / 4 for e in exact])
    wire[axes] = wire.get(axes, 0.0) + sent
    links[axes] = links.get(axes, 0.0) + sent / shards.rate(frozenset(axes), network)
