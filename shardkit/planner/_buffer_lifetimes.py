"""Which values of one program are in memory while each of its operations runs."""

from collections.abc import Hashable, Sequence

from ._program import FlatProgram, Op
from ._symbolic_sharding import SymbolicBytes, add_bytes


class BufferLifetimes:
    """Values in memory, from the operation that makes each to the last one that reads it.

    Attributes:
      at: place of the operation under way.
    """

    def __init__(self, flat: FlatProgram) -> None:
        self.flat = flat
        self.at = 0
        self._roots: dict[int, frozenset[Hashable]] = {}
        self._born: dict[Hashable, tuple[int, SymbolicBytes]] = {}
        self._read: dict[Hashable, int] = {}
        self._inner: dict[int, list[SymbolicBytes]] = {}
        self._passing: dict[int, SymbolicBytes] = {}

    def bear(self, number: int, held: SymbolicBytes) -> None:
        """A value is written to memory."""
        self._roots[number] = frozenset({number})
        self._born[number] = (self.at, held)

    def follow(self, number: int, sources: Sequence[int | None]) -> None:
        """A value is made where it is read, from values that must live until then."""
        roots = (self._roots.get(n, frozenset()) for n in sources if n is not None)
        self._roots[number] = frozenset().union(*roots)

    def read(self, op: Op) -> None:
        """The operation under way reads its operands."""
        for number in op.ins:
            for root in self._roots.get(number, ()) if number is not None else ():
                self._read[root] = self.at

    def read_by(self, op: Op) -> SymbolicBytes:
        """Bytes of the values in memory that the operation reads, each once."""
        numbers = [n for n in op.ins if n is not None]
        roots = frozenset().union(*(self._roots.get(n, frozenset()) for n in numbers))
        found: SymbolicBytes = {}
        for root in roots:
            add_bytes(found, self._born[root][1])
        return found

    def use(self, key: Hashable, held: SymbolicBytes) -> bool:
        """A value beside the program's own is read; returns whether it is made now."""
        new = key not in self._born
        if new:
            self._born[key] = (self.at, held)
        self._read[key] = self.at
        return new

    def pass_through(self, held: SymbolicBytes) -> None:
        """The operation under way holds more while it runs."""
        add_bytes(self._passing.setdefault(self.at, {}), held)

    def repeat(self, points: list[SymbolicBytes]) -> None:
        """The operation under way is a loop whose body holds these at its operations."""
        self._inner[self.at] = points

    def in_memory(self, number: int) -> bool:
        """Whether a value is written already."""
        return number in self._roots

    def alive(self, returned: int) -> list[SymbolicBytes]:
        """Bytes alive while each operation runs, without the program's arguments.

        Args:
          returned: how many of its results live to the end; a loop writes the others to their
            places in stacked arrays as soon as they are made.
        """
        last = len(self.flat.ops)
        for number in self.flat.outputs[:returned]:
            for root in self._roots.get(number, ()) if number is not None else ():
                self._read[root] = last
        starts: dict[int, list[Hashable]] = {}
        ends: dict[int, list[Hashable]] = {}
        for key, (at, _) in self._born.items():
            starts.setdefault(at, []).append(key)
            ends.setdefault(self._read.get(key, at), []).append(key)
        now: SymbolicBytes = {}
        points = []
        for at in range(last):
            for key in starts.get(at, ()):
                add_bytes(now, self._born[key][1])
            here = dict(now)
            add_bytes(here, self._passing.get(at, {}))
            points += [_plus(here, more) for more in self._inner.get(at, [])] or [here]
            for key in ends.get(at, ()):
                add_bytes(now, self._born[key][1], -1.0)
        return points


def _plus(one: SymbolicBytes, other: SymbolicBytes) -> SymbolicBytes:
    joined = dict(one)
    add_bytes(joined, other)
    return joined
