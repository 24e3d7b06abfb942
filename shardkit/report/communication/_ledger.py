"""The ledger: every collective of a compiled program, with its mesh axes, bytes and trips."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import overload

from ..._core.errors import ReportError, did_you_mean
from ..._core.tree import format_bytes
from ..hlo._hlo import Module, parse
from ..hlo._scope import combines_elements, is_windowable, phase_of, split_op_name
from ..hlo._slices import Slices
from ._collectives import KINDS, SPELLED, CollectiveSite, find_collectives

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One collective of the compiled program.

    A tuple collective is one row per dtype. A loop's collective is one row with its trips.

    Attributes:
      kind: one of `KINDS`, as XLA spells it; a TPU fusion that keeps a shard of an all-reduce
        is a `reduce-scatter`.
      axes: mesh axes whose devices exchange data, in mesh order.
      dtype: element type sent, `bf16`.
      payload_bytes: size V of the whole array of one execution: what comes out of an
        all-gather, what goes into the others, on one device.
      wire_bytes: bytes one device sends per *step* on a ring, all trips together:
        2(n−1)/n·V for all-reduce, (n−1)/n·V for all-gather, reduce-scatter and all-to-all, V for
        permute; a ragged all-to-all counts as one whose rows go to all devices alike. With
        unknown `trips`, those of one trip; in a branch, the mean over devices.
      trips: executions per step, through all loops around it, on a device that takes every branch
        to it; None where a loop's count is unknown.
      scope: the model's `named_scope` path.
      phase: `forward`, `backward`, `recompute`, `update` or `other`.
      overlapped: asynchronous, and the schedule puts compute between its start and its end.
      group: devices n that exchange data with each other.
      whole: each group is all of `axes`; False if only a part of them.
      operands: the arrays sent, `("f32[16,8]", "f32[8,16]")`, as one device holds them.
      windowed: a permute that the compiler made out of a gather or a scatter, to hide it behind
        the pieces of the product that needs it.
      conditional: stands in a branch of a conditional.
      computation: name of the HLO computation that holds it.
      name: name of the HLO instruction.
      op_name: JAX's path for it.
      phases: phase that each of `operands` comes from; the row's own is that of the most bytes.
      by_optimizer: the optimizer's own arithmetic sends it: a product, sum or norm over dims that
        the mesh splits. No gradient is reduced by it, and no parallelism asks for it.
      dcn: goes between TPU slices, whose part in a collective is a row of its own.
      taken: share of `trips` that is executed, mean over devices: below 1 in a branch of a schedule
        whose table says how often it is taken. Other branches count as always taken, so their
        bytes are an upper bound.
    """

    kind: str
    axes: Axes
    dtype: str
    payload_bytes: int
    wire_bytes: int
    trips: int | None
    scope: str
    phase: str
    overlapped: bool
    group: int
    whole: bool
    operands: tuple[str, ...]
    windowed: bool
    conditional: bool
    computation: str
    name: str
    op_name: str
    phases: tuple[str, ...] = ()
    by_optimizer: bool = False
    dcn: bool = False
    taken: float = 1.0

    @property
    def runs(self) -> float:
        """Executions per step, mean over devices; an unknown number of trips counts as one."""
        return (1 if self.trips is None else self.trips) * self.taken

    def __str__(self) -> str:
        """Returns `all-reduce over data of f32 1.00 KiB ×3 in mlp (backward)`."""
        trips = "×?" if self.trips is None else f"×{self.trips}"
        where = f" in {self.scope}" if self.scope else ""
        axes = (", ".join(self.axes) or "no axis") + (" between slices" if self.dcn else "")
        size = format_bytes(self.payload_bytes)
        return f"{self.kind} over {axes} of {self.dtype} {size} {trips}{where} ({self.phase})"


@dataclasses.dataclass(frozen=True)
class Ledger(Sequence[LedgerRow]):
    """The rows of one program, in the order of their HLO.

    Attributes:
      rows: the collectives.
      mesh: names and sizes of the mesh axes.
      problems: what could not be read. With any, totals are lower bounds; see `complete`.
    """

    rows: tuple[LedgerRow, ...]
    mesh: tuple[tuple[str, int], ...]
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every collective of the text was read, with its trips: totals are no less than true.

        They are the whole truth unless `upper_bound`.
        """
        return not self.problems

    @property
    def upper_bound(self) -> bool:
        """A row stands in a branch of which nobody says how often it is taken: it counts as always.

        So totals hold both branches of a conditional, of which a device takes one.
        """
        return any(row.conditional and row.taken == 1 for row in self.rows)

    @overload
    def __getitem__(self, index: int) -> LedgerRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LedgerRow, ...]: ...
    def __getitem__(self, index: int | slice) -> LedgerRow | tuple[LedgerRow, ...]:
        """Returns the row, or the rows of a slice."""
        return self.rows[index]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[LedgerRow]:
        """Iterates over the rows."""
        return iter(self.rows)

    def where(
        self,
        axis: str | Axes | None = None,
        kind: str | None = None,
        phase: str | None = None,
    ) -> list[LedgerRow]:
        """Rows of an axis, a kind, a phase.

        Args:
          axis: a name: rows that span this axis, alone or with others. A tuple of names: rows
            that span exactly these, in any order.
          kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"`,
            `"collective-permute"`, …; underscores do for dashes.
          phase: `"forward"`, `"backward"`, `"recompute"`, `"update"` or `"other"`.

        Raises:
          ReportError: the mesh has no such axis, or there is no such kind.
        """
        asked = (axis,) if isinstance(axis, str) else axis or ()
        self._check_names(asked, kind)
        kind = kind.replace("_", "-") if kind else None
        return [
            row
            for row in self.rows
            if (kind is None or row.kind == kind)
            and (phase is None or row.phase == phase)
            and (axis is None or _row_spans(row, axis))
        ]

    def total(self, axis: str | Axes | None = None, kind: str | None = None) -> int:
        """Wire bytes per device and step of the rows of `where(axis, kind)`.

        A lower bound where `complete` is False.
        """
        return sum(row.wire_bytes for row in self.where(axis, kind))

    def by_axes(self) -> dict[Axes, int]:
        """Exact set of axes → wire bytes per device and step; the sum is `total()`."""
        found: dict[Axes, int] = {}
        for row in self.rows:
            found[row.axes] = found.get(row.axes, 0) + row.wire_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _check_names(self, axes: Axes, kind: str | None) -> None:
        names = [name for name, _ in self.mesh]
        for axis in axes:
            if axis not in names:
                hint = did_you_mean(axis, names)
                raise ReportError(f"mesh {dict(self.mesh)} has no axis {axis!r}.{hint}")
        if kind is not None and kind.replace("_", "-") not in KINDS:
            raise ReportError(f"no collective is called {kind!r}.{did_you_mean(kind, KINDS)}")


def _row_spans(row: LedgerRow, axis: str | Axes) -> bool:
    return axis in row.axes if isinstance(axis, str) else set(axis) == set(row.axes)


def wire_bytes(kind: str, payload: int, group: int) -> float:
    """Bytes one device sends on a ring of `group` devices for one execution.

    Args:
      kind: one of `KINDS`.
      payload: bytes of the whole array; see `Row.payload_bytes`.
      group: devices in the ring.

    >>> wire_bytes("all-reduce", 1024, 4), wire_bytes("all-gather", 1024, 4)
    (1536.0, 768.0)
    >>> wire_bytes("collective-permute", 1024, 4)
    1024.0
    """
    if group < 2:
        return 0.0
    share = (group - 1) / group * payload
    if kind == "all-reduce":
        return 2 * share
    return float(payload) if kind in ("collective-permute", "collective-broadcast") else share


def read_ledger(
    hlo: str, mesh: Sequence[tuple[str, int]], dcn: Sequence[tuple[str, int]] = ()
) -> Ledger:
    """Reads the collectives of a compiled program.

    Args:
      hlo: `compiled.as_text()`.
      mesh: names and sizes of the mesh axes, in the mesh's order.
      dcn: names of the axes that cross slices, and how many slices lie along each.
    """
    return build_ledger(parse(hlo), hlo, mesh, dcn)


def build_ledger(
    module: Module,
    hlo: str,
    mesh: Sequence[tuple[str, int]],
    dcn: Sequence[tuple[str, int]] = (),
) -> Ledger:
    """Reads the collectives of a program that is parsed already; see `read_ledger`."""
    found, problems = find_collectives(module, Slices(tuple(mesh), dict(dcn)))
    rows = tuple(row for one in found for row in _split_by_dtype(one))
    spelled = len(SPELLED.findall(_blank_strings(hlo)))
    # What goes between slices is spelled as a transfer to the host.
    distinct = len({place for one in found if not one.dcn for place in one.places})
    if spelled > distinct:
        missing = spelled - distinct
        problems.append(f"{missing} of {spelled} collectives in the text were not read")
    return Ledger(rows, tuple(mesh), tuple(dict.fromkeys(problems)))


def _blank_strings(hlo: str) -> str:
    """The text with the contents of quotes left out, where anything may stand."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', hlo)


def _split_by_dtype(found: CollectiveSite) -> Iterator[LedgerRow]:
    """One row per dtype that a collective sends."""
    paths = split_op_name(found.op_name)
    # What the compiler combined keeps the path of each operand.
    if len(paths) != len(found.operands):
        paths = [found.op_name] * len(found.operands)
    pairs = list(zip(found.operands, paths, strict=True))
    for dtype in dict.fromkeys(shape.dtype for shape in found.operands):
        sent = [(shape, path) for shape, path in pairs if shape.dtype == dtype]
        shapes = [shape for shape, _ in sent]
        heaviest = max(sent, key=lambda one: one[0].nbytes)[1]
        phase = phase_of(heaviest)
        payload = sum(shape.nbytes for shape in shapes)
        if found.kind == "all-gather":
            payload *= found.span.size
        times = (1 if found.trips is None else found.trips) * found.taken
        yield LedgerRow(
            kind=found.kind,
            axes=found.span.axes,
            dtype=dtype,
            payload_bytes=payload,
            wire_bytes=round(wire_bytes(found.kind, payload, found.span.size) * times),
            trips=found.trips,
            scope=found.scope,
            phase=phase,
            overlapped=found.overlapped,
            group=found.span.size,
            whole=found.span.whole,
            operands=tuple(map(str, shapes)),
            windowed=found.kind == "collective-permute"
            and not found.dcn
            and is_windowable(heaviest),
            conditional=found.conditional,
            computation=found.computation,
            name=found.instruction.name,
            op_name=found.op_name,
            phases=tuple(phase_of(path) for _, path in sent),
            by_optimizer=phase == "update" and combines_elements(heaviest),
            dcn=found.dcn,
            taken=float(found.taken),
        )
