"""Which values of one program are in memory while each of its operations runs."""

from collections.abc import Hashable, Sequence

from ._program import FlatProgram, Op
from ._symbolic_sharding import SymbolicBytes, add_bytes


class BufferLifetimes:
    """Buffers, from the operation that writes each to the last one that reads it."""

    def __init__(self, flat: FlatProgram) -> None:
        self.flat = flat
        self.at = 0  # index of the operation under way
        self._roots: dict[int, frozenset[Hashable]] = {}  # value → buffers it is computed from
        self._written: dict[Hashable, tuple[int, SymbolicBytes]] = {}
        self._last_read: dict[Hashable, int] = {}
        self._loop_bodies: dict[int, list[SymbolicBytes]] = {}
        self._scratch: dict[int, SymbolicBytes] = {}

    def allocate(self, number: int, size: SymbolicBytes) -> None:
        """Writes a value to a buffer of its own."""
        self._roots[number] = frozenset({number})
        self._written[number] = (self.at, size)

    def alias(self, number: int, sources: Sequence[int | None]) -> None:
        """Gives a value no buffer: its readers compute it from buffers that live until then."""
        roots = (self._roots.get(n, frozenset()) for n in sources if n is not None)
        self._roots[number] = frozenset().union(*roots)

    def read(self, op: Op) -> None:
        """Keeps the operands' buffers until the operation under way."""
        for number in op.ins:
            for root in self._roots.get(number, ()) if number is not None else ():
                self._last_read[root] = self.at

    def bytes_read_by(self, op: Op) -> SymbolicBytes:
        """Bytes of the buffers that the operation reads, each once."""
        numbers = [n for n in op.ins if n is not None]
        roots = frozenset().union(*(self._roots.get(n, frozenset()) for n in numbers))
        total: SymbolicBytes = {}
        for root in roots:
            add_bytes(total, self._written[root][1])
        return total

    def read_temporary(self, key: Hashable, size: SymbolicBytes) -> bool:
        """Reads a buffer that is not a value of the program; returns whether it is written now."""
        new = key not in self._written
        if new:
            self._written[key] = (self.at, size)
        self._last_read[key] = self.at
        return new

    def add_scratch(self, size: SymbolicBytes) -> None:
        """Adds memory that the operation under way holds while it runs."""
        add_bytes(self._scratch.setdefault(self.at, {}), size)

    def nest_loop(self, live: list[SymbolicBytes]) -> None:
        """Puts the live bytes of a loop's body in the place of the operation under way."""
        self._loop_bodies[self.at] = live

    def is_written(self, number: int) -> bool:
        """Whether a value has a buffer, or is computed from one."""
        return number in self._roots

    def live_bytes(self, returned: int) -> list[SymbolicBytes]:
        """Bytes alive while each operation runs, without the program's arguments.

        The first `returned` results live to the end; a loop writes the others to their places in
        stacked arrays as soon as they are computed.
        """
        last = len(self.flat.ops)
        for number in self.flat.outputs[:returned]:
            for root in self._roots.get(number, ()) if number is not None else ():
                self._last_read[root] = last
        starts: dict[int, list[Hashable]] = {}
        ends: dict[int, list[Hashable]] = {}
        for key, (at, _) in self._written.items():
            starts.setdefault(at, []).append(key)
            ends.setdefault(self._last_read.get(key, at), []).append(key)
        now: SymbolicBytes = {}
        live = []
        for at in range(last):
            for key in starts.get(at, ()):
                add_bytes(now, self._written[key][1])
            here = dict(now)
            add_bytes(here, self._scratch.get(at, {}))
            live += [_sum(here, inner) for inner in self._loop_bodies.get(at, [])] or [here]
            for key in ends.get(at, ()):
                add_bytes(now, self._written[key][1], -1.0)
        return live


def _sum(left: SymbolicBytes, right: SymbolicBytes) -> SymbolicBytes:
    total = dict(left)
    add_bytes(total, right)
    return total
