"""What a step sends, grouped by the line of the user's code that causes it."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import overload

from .._core.errors import count
from .._core.io._notebook import notebook_html
from .._core.io._table import Column, Table, text_width
from .._core.source import Source
from .._core.tree import format_bytes
from .communication._ledger import Ledger, LedgerRow
from .findings._finding import SMALL, Finding, named_shares

_PARTS = 6
OPTIMIZER, UNKNOWN = "the optimizer", "unknown"
_WHY_UNKNOWN = "(the compiled program names no line of your code for these)"
_NO_CODE = "(the file is not at hand, or has changed since it was imported)"


@dataclasses.dataclass(frozen=True)
class SourceCost:
    """What one line of code sends."""

    source: Source | None  # the line; None for what no line of the user's code causes
    # `model.py:42 in attend`; without a line `"the optimizer"` (the update and its norms) or
    # `"unknown"`
    name: str
    bytes: int  # wire bytes per device and step
    # those of them that findings are about: what is sent beyond the minimum, as far as that is
    # known
    in_findings: int
    parts: tuple["SourcePart", ...]  # what it sends, the most bytes first

    @property
    def code(self) -> str:
        """The line's text, or why there is none."""
        if self.name == UNKNOWN:
            return _WHY_UNKNOWN
        return (self.source.code or _NO_CODE) if self.source else ""

    def part_cells(self) -> Iterator[tuple[str, str, str]]:
        """Bytes, collective and reason of each part as text; those that read the same are one."""
        same: dict[tuple[str, str], list[int]] = {}
        for part in self.parts:
            same.setdefault(part.describe(), []).append(part.bytes)
        ordered = sorted(same.items(), key=lambda one: -sum(one[1]))
        for (what, why), sizes in ordered[:_PARTS]:
            times = f"{len(sizes)} of " if len(sizes) > 1 else ""
            yield format_bytes(sum(sizes)), f"{times}{what}", why
        if others := [size for _, sizes in ordered[_PARTS:] for size in sizes]:
            yield format_bytes(sum(others)), f"{len(others)} more collectives", ""


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """What one line of code sends by one collective."""

    row: LedgerRow  # the collective, which may also send arrays of other lines
    operands: tuple[int, ...]  # indices of the line's arrays among `row.operands`
    bytes: int  # wire bytes of these

    def describe(self) -> tuple[str, str]:
        """The collective, and what it lies between, as text."""
        row = self.row
        trips = "" if row.trips == 1 else f" ×{'?' if row.trips is None else row.trips}"
        axes = ", ".join(row.axes) or "no axis"
        arrays = ", ".join(row.operands[n] for n in self.operands[:2])
        arrays += f" and {len(self.operands) - 2} more" if len(self.operands) > 2 else ""
        what = f"{row.kind} over {axes} of {arrays}{trips} ({row.phase})"
        largest = max(self.operands, key=row.operand_bytes.__getitem__)
        return what, str(row.ends[largest]) if row.ends else ""


@dataclasses.dataclass(frozen=True)
class BySource(Sequence[SourceCost]):
    """The lines of code that send something; they add up to the ledger.

    Those with the most bytes in findings come first, of the others those with the most bytes.

    Attributes:
      costs: one per line.
    """

    costs: tuple[SourceCost, ...]

    @overload
    def __getitem__(self, index: int) -> SourceCost: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SourceCost, ...]: ...
    def __getitem__(self, index: int | slice) -> SourceCost | tuple[SourceCost, ...]:
        """Returns a line, or the lines of a slice."""
        return self.costs[index]

    def __len__(self) -> int:
        """Number of lines."""
        return len(self.costs)

    def __repr__(self) -> str:
        total = format_bytes(sum(cost.bytes for cost in self.costs))
        return f"BySource({count(len(self), 'line')}, {total} sent)"

    def _repr_html_(self) -> str:
        rows = [
            (cost.name, format_bytes(cost.bytes), format_bytes(cost.in_findings), cost.code)
            for cost in self.costs
        ]
        sizes = (Column("sent", right=True), Column("in findings", right=True))
        return notebook_html(repr(self), Table(["source", *sizes, "code"], rows))

    def __str__(self) -> str:
        """For each line its bytes and code; below it, what it sends and why."""
        total = sum(cost.bytes for cost in self.costs)
        parts: list[str] = [f"Sent per step by source line: {format_bytes(total)}"]
        for cost in self.costs:
            share = f"{cost.bytes / total:.0%}" if total else "0%"
            beyond = f", {format_bytes(cost.in_findings)} in findings" if cost.in_findings else ""
            parts += [
                f"\n{format_bytes(cost.bytes)} ({share}){beyond}  {cost.name}  {cost.code}".rstrip()
            ]
            columns = [Column("", right=True, most=10), Column("", most=36), Column("", most=48)]
            parts.append(Table(columns, list(cost.part_cells()), indent=2).to_text(text_width()))
        return "\n".join(parts)


def group_by_source(ledger: Ledger, findings: Sequence[Finding] = ()) -> BySource:
    """Groups the wire bytes of a ledger by source line; the sum over all lines is `ledger.total()`.

    A collective of arrays of several lines is divided among them in proportion to the arrays.
    """
    lines: dict[tuple[str, int], list[tuple[Source | None, SourcePart, float]]] = {}
    at = {number: one.source for one in reversed(findings) for number in one.rows}
    shares = named_shares(ledger, findings)
    for number, (row, share) in enumerate(zip(ledger, shares, strict=True)):
        named = row.wire_bytes * share
        # Findings are about arrays of their line before others that are combined with these.
        order = functools.partial(_is_beside, at.get(number))
        for source, part in sorted(_divide_row(row), key=lambda one: order(one[0])):
            unknown = OPTIMIZER if row.phase == "update" else UNKNOWN
            key = (source.file, source.line) if source else (unknown, 0)
            lines.setdefault(key, []).append((source, part, min(part.bytes, named)))
            named -= min(part.bytes, named)
    costs = []
    for (name, _), found in lines.items():
        source = found[0][0]
        parts = tuple(sorted((part for _, part, _ in found), key=lambda part: -part.bytes))
        total, named = (
            sum(sizes) for sizes in zip(*((p.bytes, n) for _, p, n in found), strict=True)
        )
        costs.append(
            SourceCost(source, str(source) if source else name, total, round(named), parts)
        )
    return BySource(tuple(sorted(costs, key=_rank)))


def _is_beside(line: Source | None, source: Source | None) -> tuple[bool, bool]:
    """Whether an array is of another line than a finding's; without one it comes last."""
    if line is None or source is None:
        return True, source is None
    return (line.file, line.line) != (source.file, source.line), False


def _rank(cost: SourceCost) -> tuple[int, int]:
    """Most bytes in findings first; scalars that are combined with their rows count for none."""
    return -cost.in_findings if cost.in_findings > SMALL else 0, -cost.bytes


def _divide_row(row: LedgerRow) -> Iterator[tuple[Source | None, SourcePart]]:
    """Divides a row among the lines of its arrays; the bytes add up to the row's."""
    sizes = row.operand_bytes
    lines: dict[tuple[str, int] | None, tuple[Source | None, list[int]]] = {}
    for number, source in enumerate(row.sources or (None,) * len(sizes)):
        key = (source.file, source.line) if source else None
        lines.setdefault(key, (source, []))[1].append(number)
    counted, passed = 0, 0
    for source, numbers in lines.values():
        passed += sum(sizes[number] for number in numbers)
        # Rounded on the running sum, so that no byte is lost or counted twice.
        end = row.wire_bytes * passed // sum(sizes) if passed < sum(sizes) else row.wire_bytes
        yield source, SourcePart(row, tuple(numbers), end - counted)
        counted = end
