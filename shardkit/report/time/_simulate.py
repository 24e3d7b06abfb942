"""Plays a compiler's schedule: compute by its estimated cycles, collectives by their links.

A clock runs through each computation in the order of its text. An operation with an estimate
moves it on. A synchronous collective moves it on by its whole time. An asynchronous one starts
on its links and goes on behind what follows; at its `-done` the clock waits for what is left.
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
from ..hlo._trips import TripCounts
from ._traffic import instruction_traffic

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NESTED = ("call", "conditional", "async-start")
# Scalars and indices cost nothing that would show.
_SMALL = 1024
_CHAIN_END = "async-collective-done"
Key = tuple[str, str, str, Axes]


@dataclasses.dataclass
class Simulated:
    """What one execution of a computation takes.

    Attributes:
      seconds: from its first to its last instruction.
      parts: (phase, scope, "compute" or "communication", mesh axes) → seconds, of which exposed.
      estimated: operations that the compiler gives an estimate for.
      guessed: name of an operation without one → how many there are.
      kernels: the same for hand-written kernels.
    """

    seconds: float = 0.0
    parts: dict[Key, list[float]] = dataclasses.field(default_factory=dict)
    estimated: int = 0
    guessed: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, key: Key, seconds: float, exposed: float) -> None:
        """Adds to a part."""
        part = self.parts.setdefault(key, [0.0, 0.0])
        part[0] += seconds
        part[1] += exposed

    def include(self, other: "Simulated", trips: int = 1) -> None:
        """Adds what a loop, branch or call takes."""
        self.seconds += trips * other.seconds
        for key, (seconds, exposed) in other.parts.items():
            self.add(key, trips * seconds, trips * exposed)
        self.estimated += other.estimated
        for mine, theirs in ((self.guessed, other.guessed), (self.kernels, other.kernels)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number


@dataclasses.dataclass
class _Transfers:
    """What is under way in one execution of a computation.

    Each set of mesh axes has two lanes, the directions of its ring: a permute takes the one that
    is free first, everything else takes both.
    """

    directions: dict[Axes, list[float]] = dataclasses.field(default_factory=dict)
    ends: dict[str, tuple[float, Key]] = dataclasses.field(default_factory=dict)

    def send(self, now: float, row: LedgerRow, seconds: float) -> float:
        """Puts a collective on its lanes; returns when it ends."""
        lanes = self.directions.setdefault(row.axes, [0.0, 0.0])
        if row.kind == "collective-permute":
            lane = lanes.index(min(lanes))
            lanes[lane] = end = max(now, lanes[lane]) + seconds
        else:
            end = max(now, *lanes) + seconds
            lanes[:] = [end, end]
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
        """Plays a whole step."""
        played = self._simulate_computation(self._module.entry)
        if missed := len(self._rows.keys() - self._visited):
            self.problems.append(
                f"{count(missed, 'collective')} in no schedule: their time is missing"
            )
        return played

    def _simulate_computation(self, name: str) -> Simulated:
        here, played, wires = self._module.computations[name], Simulated(), _Transfers()
        for instruction in here.instructions.values():
            if rows := list(self._collectives(here, instruction)):
                self._send(played, wires, here, instruction, rows)
            elif instruction.operands and instruction.operands[0] in wires.ends:
                self._receive(played, wires, here, instruction)
            elif instruction.opcode == "while":
                body = self._simulate_computation(dict(instruction.calls)["body"])
                played.include(body, self._trips(here, instruction))
            elif instruction.opcode in _NESTED:
                branches = [self._simulate_computation(callee) for _, callee in instruction.calls]
                if branches:
                    played.include(max(branches, key=lambda branch: branch.seconds))
            else:
                self._compute(played, here, instruction)
        return played

    def _trips(self, here: Computation, loop: Instruction) -> int:
        trips = self._loops.trips(here.name, loop.name)
        if trips is None:
            self.problems.append(f"loop {loop.name} runs an unknown number of times; counted once")
        return 1 if trips is None else trips

    def _collectives(self, here: Computation, instruction: Instruction) -> Iterator[LedgerRow]:
        """Collectives that an instruction is, or that a fusion or an asynchronous call holds."""
        key = (here.name, instruction.name)
        self._visited.add(key)
        if collective_kind(instruction):
            yield from self._rows.get(key, {}).values()
        elif instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
            for _, callee in instruction.calls:
                inner = self._module.computations[callee]
                for one in inner.instructions.values():
                    yield from self._collectives(inner, one)

    def _send(
        self,
        played: Simulated,
        wires: _Transfers,
        here: Computation,
        instruction: Instruction,
        rows: list[LedgerRow],
    ) -> None:
        start = played.seconds
        key = (rows[0].phase, rows[0].scope, "communication", rows[0].axes)
        end = start
        for row in rows:
            seconds = self._links.seconds(row)
            played.add((row.phase, row.scope, "communication", row.axes), seconds, 0.0)
            end = max(end, wires.send(start, row, seconds))
        if instruction.opcode.endswith("-start"):
            wires.ends[instruction.name] = (end, key)
            return
        if crosses_slices(instruction):
            wires.ends[find_recv(instruction, here) or instruction.name] = (end, key)
            return
        self._compute(played, here, instruction)
        # An overlapped fusion starts a chain that goes on behind the compute of its other steps.
        if instruction.opcode == "fusion" and rows[0].overlapped:
            wires.ends[instruction.name] = (end, key)
        else:
            self._wait(played, end, key)

    def _receive(
        self, played: Simulated, wires: _Transfers, here: Computation, instruction: Instruction
    ) -> None:
        end, key = wires.ends[instruction.operands[0]]
        if instruction.opcode == "fusion":
            self._compute(played, here, instruction)
        if instruction.opcode.endswith("-done") or instruction.name.startswith(_CHAIN_END):
            self._wait(played, end, key)
        else:
            wires.ends[instruction.name] = (end, key)

    def _wait(self, played: Simulated, end: float, key: Key) -> None:
        exposed = max(0.0, end - played.seconds)
        played.add(key, 0.0, exposed)
        played.seconds += exposed

    def _compute(self, played: Simulated, here: Computation, instruction: Instruction) -> None:
        if cycles := _CYCLES.search(instruction.rest):
            assert self._links.chip.clock is not None
            seconds = int(cycles.group(1)) / self._links.chip.clock
            played.estimated += 1
        else:
            # Copies between memories run behind the compute that does not need them yet.
            moved = instruction_traffic(self._module, here, instruction)
            if moved <= _SMALL or instruction.opcode == "copy-start":
                return
            seconds = moved / self._links.chip.memory_bandwidth
            names = played.kernels if "tpu_custom_call" in instruction.rest else played.guessed
            name = re.sub(r"[.\d]+$", "", instruction.name)
            names[name] = names.get(name, 0) + 1
        path = instruction.op_name
        played.add((phase_of(path), scope_of(path), "compute", ()), seconds, seconds)
        played.seconds += seconds
