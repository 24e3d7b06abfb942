"""Memory and time of pipelines, from the walk of the program that they carry out.

The walk tells what one micro-batch costs before, in and behind the layers; the tick table tells
which stage does which of it when. A tick lasts as long as the longest of its stages' work, since
all wait for the exchange behind it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from .._core.types import Accumulate
from ..parallel import Branch, gradient_shard_axes, schedule, tick_program
from ._costs import PARTS, PIPE
from ._estimate import Estimates, Machine, Parts, each_sent, each_work
from ._space import Stages
from ._state_bytes import Placed
from ._symbolic_sharding import product
from ._trace import Walked

Case = tuple[Mapping[str, int], Stages]
_SUMS = ("all-reduce", "reduce-scatter")
_FIRST, _FORWARD, _LAST, _BACKWARD, _BEGUN = (PARTS.index(name) for name in PARTS)


@dataclasses.dataclass(frozen=True)
class Roles:
    """A tick table as what stages do at once.

    Attributes:
      shares: f64[roles, parts], how much of each part of the program a role is.
      run_locally: the roles of a tick, and in how many ticks they are.
      mean: f64[parts], how often a stage does each part, on the average.
      exchanges: ticks behind which something is sent.
      messages: how often one stage sends, on the average.
      slots: messages that a stage keeps at once.
    """

    shares: np.ndarray
    at_once: Mapping[frozenset[int], int]
    mean: np.ndarray
    exchanges: int
    messages: float
    slots: int


@functools.lru_cache(maxsize=256)
def roles(how: Stages, stages: int) -> Roles:
    """Reads a schedule's table.

    >>> found = roles(Stages("gpipe", 4), 2)
    >>> found.mean.tolist()  # the last stage goes forward within its backward pass alone
    [4.0, 6.0, 2.0, 4.0, 2.0]
    >>> found.slots, found.messages
    (6, 8.0)
    """
    table = schedule(
        how.schedule,
        stages=stages,
        micro_batches=how.micro_batches,
        virtual_stages=how.virtual_stages,
    )
    plan = tick_program(table)
    rows = np.stack([plan.columns[name] for name in ("branch", "first", "last")], -1)
    kinds, which = np.unique(rows.reshape(-1, 3), axis=0, return_inverse=True)
    which = which.reshape(rows.shape[:2])
    shares = np.array([_shares(*kind, how.virtual_stages) for kind in kinds.tolist()])
    at_once: dict[frozenset[int], int] = {}
    for tick in which.tolist():
        at_once[frozenset(tick)] = at_once.get(frozenset(tick), 0) + 1
    often = np.bincount(which.ravel(), minlength=len(kinds)) / stages
    sizes = [sum(map(len, exchange)) for exchange in plan.exchanges]
    return Roles(
        shares=shares,
        at_once=at_once,
        mean=often @ shares,
        exchanges=sum(sizes[number] > 0 for number in plan.exchange),
        messages=plan.messages() / stages,
        slots=plan.slots + 1,
    )


def _shares(branch: int, first: int, last: int, virtual: int) -> list[float]:
    """How much of each part of the program a stage's layers and ends are in one tick."""
    share = [0.0] * len(PARTS)
    if branch == Branch.IDLE:
        return share
    share[_FORWARD] = 1 / virtual  # a backward pass computes its part again
    if branch == Branch.FORWARD:
        share[_FIRST] = float(first)
        return share
    share[_BACKWARD] = (1.0 if branch == Branch.BACKWARD else 0.5) / virtual
    if branch != Branch.WEIGHT:
        share[_FIRST] = share[_BEGUN] = float(first)
        share[_LAST] = float(last)
    return share


def estimate_stages(
    walked: Walked,
    cases: Sequence[Case],
    placed: Sequence[Placed],
    machine: Machine,
    batch_scale: float = 1.0,
) -> tuple[Estimates, np.ndarray]:
    """Evaluates a walk on every mesh with its pipeline, all of them at once.

    Args:
      walked: what one step's loss and gradient do.
      cases: `{axis: size}` and pipeline, each.
      placed: exact bytes of each.
      machine: the devices.
      batch_scale: as if the batch had so many times its rows.

    Returns:
      The estimates, and the seconds in which a stage waits for others.
    """
    parts = Parts([(m, Accumulate(how.micro_batches)) for m, how in cases], batch_scale)
    made = [roles(how, sizes[PIPE]) for sizes, how in cases]
    mean = np.array([one.mean for one in made]).T  # [parts, cases]
    compute, memory = each_work(walked, parts, machine)
    ticking: dict[tuple[str, ...], np.ndarray] = {}
    wire: dict[tuple[str, ...], np.ndarray] = {}
    spent: dict[tuple[str, ...], np.ndarray] = {}
    nothing, rows = np.zeros((len(PARTS), len(cases))), frozenset(gradient_shard_axes())
    for one, sent, seconds in each_sent(walked, parts, machine):
        name = tuple(axis for axis in cases[0][0] if axis in one.axes)
        often = one.trips * parts.of([one.loops])[0]
        summed = one.gradient or (one.axes <= rows and one.kind in _SUMS)
        if summed:
            # Once per step: gradients stay on their device; those of the ends see `_exchanged`.
            often = often * (PIPE in one.loops)
        elif one.weight:
            # Once per step too, whole, and not again for the backward pass.
            often = often * (PARTS[one.part] in ("first", "forward", "last"))
        else:
            ticking.setdefault(name, nothing.copy())[one.part] += often * seconds
            often = often * mean[one.part]
        wire[name] = wire.get(name, 0.0) + often * sent
        spent[name] = spent.get(name, 0.0) + often * seconds
    busy = compute + memory + (1 - machine.overlap) * sum(ticking.values(), nothing)
    waits = np.array(
        [_length(one, busy[:, i]) - one.mean @ busy[:, i] for i, one in enumerate(made)]
    )
    message = parts.bytes([walked.walk.message])[0]
    _exchanged(cases, placed, made, message, parts, machine, wire, spent)
    temp = parts.bytes(walked.points).max(axis=0)
    temp = temp + np.array([one.slots for one in made]) * message
    temp = temp + np.array([_kept(one, machine.width) for one in placed])
    estimates = Estimates(temp, (mean * compute).sum(0), (mean * memory).sum(0), wire, spent)
    return estimates, waits


def _length(one: Roles, busy: np.ndarray) -> float:
    """Seconds of all ticks."""
    each = one.shares @ busy
    return sum(count * max(each[role] for role in at) for at, count in one.at_once.items())


def _kept(placed: Placed, width: int) -> float:
    """Gradients in f32 while they add up, and weights that were gathered for the whole step."""
    gathered = placed.lane if placed.lane > placed.shard else 0
    return placed.lane + gathered * width / 4


def _exchanged(
    cases: Sequence[Case],
    placed: Sequence[Placed],
    made: Sequence[Roles],
    message: np.ndarray,
    parts: Parts,
    machine: Machine,
    wire: dict[tuple[str, ...], np.ndarray],
    spent: dict[tuple[str, ...], np.ndarray],
) -> None:
    """Adds what goes over stage boundaries, and the one sum of what every stage has."""
    rate, hop = parts.rate(frozenset({PIPE}), machine.network), machine.network.chip.latency
    exchanges = np.array([one.exchanges for one in made])
    wire[(PIPE,)] = np.array([one.messages for one in made]) * message
    spent[(PIPE,)] = exchanges * (message / rate + hop)
    axes = tuple(axis for axis in cases[0][0] if axis in (*gradient_shard_axes(), PIPE))
    n = product(axes, parts.sizes)
    ends = 2 * (n - 1) / n * np.array([one.ends * machine.width / 4 for one in placed])
    wire[axes] = wire.get(axes, 0.0) + ends
    spent[axes] = spent.get(axes, 0.0) + ends / parts.rate(frozenset(axes), machine.network)
