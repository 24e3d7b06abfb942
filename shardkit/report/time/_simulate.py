"""Simulates a compiler's schedule: compute by its estimated cycles, collectives by their links.

A clock advances through each computation in the order of its text: by the estimate of an operation,
and by the whole time of a synchronous collective. An asynchronous collective occupies its links
while the clock continues; at its `-done` the clock waits for the remaining time:

    all-gather-start    3 ms on the links     clock 0
    fusion              2 ms                  clock 0 → 2
    all-gather-done     waits for 1 ms        clock 2 → 3: 3 ms of communication, 1 ms exposed
"""

import dataclasses
import re
from collections.abc import Iterator

from ..._core.errors import count
from ..communication._collectives import collective_kind
from ..communication._ledger import Axes, Ledger, LedgerRow
from ..communication._links import Links
from ..hlo._hlo import Computation, Instruction, Module
from ..hlo._scope import phase_of, scope_of
from ..hlo._slices import crosses_slices, find_recv
from ..hlo._source_lines import place_of
from ..hlo._trips import TripCounts
from ._traffic import instruction_traffic

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NESTED = ("call", "conditional", "async-start")
# Smaller operations (scalars, indices) are left out.
_SMALL = 1024
_CHAIN_END = "async-collective-done"
Key = tuple[str, str, str, Axes]


@dataclasses.dataclass
class Simulated:
    """Simulated time of one execution of a computation."""

    seconds: float = 0.0  # from the first to the last instruction
    # (phase, scope, "compute" or "communication", mesh axes) → [seconds, exposed seconds]
    parts: dict[Key, list[float]] = dataclasses.field(default_factory=dict)
    # the same key → seconds and place (see `place_of`) of its longest operation
    places: dict[Key, tuple[float, str]] = dataclasses.field(default_factory=dict)
    estimated: int = 0  # number of operations with an estimate of the compiler
    # name of an operation without an estimate → count
    guessed: dict[str, int] = dataclasses.field(default_factory=dict)
    # the same for hand-written kernels
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, key: Key, seconds: float, exposed: float, place: str = "") -> None:
        """Adds to a part, what an operation at some place takes."""
        self._add(key, seconds, exposed, (seconds, place))

    def _add(self, key: Key, seconds: float, exposed: float, longest: tuple[float, str]) -> None:
        self.places[key] = max(self.places.get(key, (0.0, "")), longest)
        part = self.parts.setdefault(key, [0.0, 0.0])
        part[0] += seconds
        part[1] += exposed

    def include(self, other: "Simulated", trips: int = 1) -> None:
        """Adds the time of a loop, branch or call."""
        self.seconds += trips * other.seconds
        for key, (seconds, exposed) in other.parts.items():
            longest, place = other.places[key]
            self._add(key, trips * seconds, trips * exposed, (trips * longest, place))
        self.estimated += other.estimated
        for counts, added in ((self.guessed, other.guessed), (self.kernels, other.kernels)):
            for name, number in added.items():
                counts[name] = counts.get(name, 0) + number


@dataclasses.dataclass
class _Transfers:
    """Collectives in flight in one execution of a computation.

    The ring of a set of mesh axes has two directions: a permute uses the one that is free first,
    all others use both.

    Attributes:
      directions: mesh axes → when each direction becomes free, in seconds.
      ends: name of a start → when its collective ends, and its part of the simulated time.
    """

    directions: dict[Axes, list[float]] = dataclasses.field(default_factory=dict)
    ends: dict[str, tuple[float, Key]] = dataclasses.field(default_factory=dict)

    def send(self, now: float, row: LedgerRow, seconds: float) -> float:
        """Puts a collective on its ring and returns when it ends."""
        directions = self.directions.setdefault(row.axes, [0.0, 0.0])
        if row.kind == "collective-permute":
            first = directions.index(min(directions))
            directions[first] = end = max(now, directions[first]) + seconds
        else:
            end = max(now, *directions) + seconds
            directions[:] = [end, end]
        return end


class ScheduleSimulator:
    """A scheduled program on the links of a mesh."""

    def __init__(self, module: Module, ledger: Ledger, links: Links) -> None:
        self._module = module
        self._links = links
        self._loops = TripCounts(module)
        self._rows: dict[tuple[str, str], dict[str, LedgerRow]] = {}
        for row in ledger:
            self._rows.setdefault((row.computation, row.name), {})[row.dtype] = row
        self._visited: set[tuple[str, str]] = set()
        self.problems: list[str] = []

    def simulate(self) -> Simulated:
        """Simulates a whole step."""
        result = self._simulate_computation(self._module.entry)
        if missed := len(self._rows.keys() - self._visited):
            self.problems.append(
                f"{count(missed, 'collective')} in no schedule: their time is missing"
            )
        return result

    def _simulate_computation(self, name: str) -> Simulated:
        here, result, transfers = self._module.computations[name], Simulated(), _Transfers()
        for instruction in here.instructions.values():
            if rows := list(self._collectives(here, instruction)):
                self._send(result, transfers, here, instruction, rows)
            elif instruction.operands and instruction.operands[0] in transfers.ends:
                self._receive(result, transfers, here, instruction)
            elif instruction.opcode == "while":
                body = self._simulate_computation(dict(instruction.calls)["body"])
                result.include(body, self._trips(here, instruction))
            elif instruction.opcode in _NESTED:
                branches = [self._simulate_computation(callee) for _, callee in instruction.calls]
                if branches:
                    result.include(max(branches, key=lambda branch: branch.seconds))
            else:
                self._compute(result, here, instruction)
        return result

    def _trips(self, here: Computation, loop: Instruction) -> int:
        trips = self._loops.trips(here.name, loop.name)
        if trips is None:
            self.problems.append(f"loop {loop.name} runs an unknown number of times; counted once")
        return 1 if trips is None else trips

    def _collectives(self, here: Computation, instruction: Instruction) -> Iterator[LedgerRow]:
        """Rows of an instruction, or of those inside a fusion or an asynchronous call."""
        key = (here.name, instruction.name)
        self._visited.add(key)
        if collective_kind(instruction):
            yield from self._rows.get(key, {}).values()
        elif instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
            for _, callee in instruction.calls:
                inner = self._module.computations[callee]
                for member in inner.instructions.values():
                    yield from self._collectives(inner, member)

    def _send(
        self,
        result: Simulated,
        transfers: _Transfers,
        here: Computation,
        instruction: Instruction,
        rows: list[LedgerRow],
    ) -> None:
        start = result.seconds
        key = (rows[0].phase, rows[0].scope, "communication", rows[0].axes)
        end = start
        for row in rows:
            seconds = self._links.seconds(row)
            key_of_row = (row.phase, row.scope, "communication", row.axes)
            result.add(key_of_row, seconds, 0.0, place_of(instruction))
            end = max(end, transfers.send(start, row, seconds))
        if instruction.opcode.endswith("-start"):
            transfers.ends[instruction.name] = (end, key)
            return
        if crosses_slices(instruction):
            transfers.ends[find_recv(instruction, here) or instruction.name] = (end, key)
            return
        self._compute(result, here, instruction)
        # An overlapped fusion starts a chain, which continues behind the compute of the next ones.
        if instruction.opcode == "fusion" and rows[0].overlapped:
            transfers.ends[instruction.name] = (end, key)
        else:
            self._wait(result, end, key)

    def _receive(
        self, result: Simulated, transfers: _Transfers, here: Computation, instruction: Instruction
    ) -> None:
        end, key = transfers.ends[instruction.operands[0]]
        if instruction.opcode == "fusion":
            self._compute(result, here, instruction)
        if instruction.opcode.endswith("-done") or instruction.name.startswith(_CHAIN_END):
            self._wait(result, end, key)
        else:
            transfers.ends[instruction.name] = (end, key)

    def _wait(self, result: Simulated, end: float, key: Key) -> None:
        exposed = max(0.0, end - result.seconds)
        result.add(key, 0.0, exposed)
        result.seconds += exposed

    def _compute(self, result: Simulated, here: Computation, instruction: Instruction) -> None:
        if cycles := _CYCLES.search(instruction.rest):
            assert self._links.chip.clock is not None
            seconds = int(cycles.group(1)) / self._links.chip.clock
            result.estimated += 1
        else:
            # Copies between memories run behind the compute in front of their use.
            moved = instruction_traffic(self._module, here, instruction)
            if moved <= _SMALL or instruction.opcode == "copy-start":
                return
            seconds = moved / self._links.chip.memory_bandwidth
            names = result.kernels if "tpu_custom_call" in instruction.rest else result.guessed
            name = re.sub(r"[.\d]+$", "", instruction.name)
            names[name] = names.get(name, 0) + 1
        path = instruction.op_name
        key = (phase_of(path), scope_of(path), "compute", ())
        result.add(key, seconds, seconds, place_of(instruction))
        result.seconds += seconds
