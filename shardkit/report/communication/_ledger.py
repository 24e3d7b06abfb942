"""The ledger: every collective of a compiled program, with its mesh axes, bytes and trips."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import overload

from ..._core.errors import ReportError, count, did_you_mean
from ..._core.io._notebook import notebook_html
from ..._core.io._table import Column, Table
from ..._core.source import Source
from ..._core.tree import format_bytes
from ..hlo._hlo import Module, parse, parse_shapes
from ..hlo._readers import find_fusion
from ..hlo._scope import (
    combines_elements,
    is_windowable,
    moves_matrices,
    phase_of,
    scope_of,
    split_op_name,
)
from ..hlo._slices import Slices
from ..hlo._source_lines import Sources, restore_paths
from ._collectives import KINDS, SPELLED, CollectiveSite, find_collectives

_NO_ROW = "The ledger has no such row."

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ends:
    """What a collective lies between, for one of its arrays; "" for what is unknown.

    Attributes:
      made_by: what made the array: an argument of the step, or an operation and its line.
      wanted_by: the operation that reads the result, and its line.
      declared_by: the declaration that decides the layout on one of the two sides.
    """

    made_by: str = ""
    wanted_by: str = ""
    declared_by: str = ""

    def __str__(self) -> str:
        """Returns `made by params/w; wanted by dot_general at model.py:42 in attend`."""
        ends = {"made by": self.made_by, "wanted by": self.wanted_by}
        ends["declared by"] = self.declared_by
        return "; ".join(f"{label} {text}" for label, text in ends.items() if text)


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One collective of the compiled program.

    A tuple collective has one row per dtype, a collective in a loop one row with its trips.

    Attributes:
      kind: one of `KINDS`, as XLA spells it; a TPU fusion that keeps a shard of an all-reduce
        is a `reduce-scatter`.
      axes: mesh axes whose devices exchange data, in mesh order.
      dtype: element type, `bf16`.
      payload_bytes: size V of the array of one execution on one device: the result of an
        all-gather, the operand of the others.
      wire_bytes: bytes one device sends per *step* on a ring, all trips together:
        2(n−1)/n·V for all-reduce, (n−1)/n·V for all-gather, reduce-scatter and all-to-all, V for
        a permute in which every device sends; a ragged all-to-all counts as if its rows went to
        all devices evenly. Where some devices send less, in a permute or a branch, their mean.
        With unknown `trips`, the bytes of `known_trips`.
      trips: executions per step, the product of all loops around it, on a device that takes every
        branch to it; None if the trip count of a loop is unknown.
      scope: the model's `named_scope` path.
      phase: `forward`, `backward`, `recompute`, `update` or `other`.
      overlapped: asynchronous, with compute scheduled between its start and its end.
      group: devices n that exchange data with each other.
      full_axes: each group has all devices along `axes`; False if only some.
      operands: the arrays, `("f32[16,8]", "f32[8,16]")`, as one device holds them.
      windowed: a permute into which the compiler turned a gather or a scatter, to hide it behind
        pieces of the product that needs it (windowed einsum).
      conditional: it is in a branch of a conditional.
      computation: name of its HLO computation.
      name: name of the HLO instruction.
      op_name: JAX's path for it.
      phases: phase of each of `operands`; `phase` is that of the largest.
      by_optimizer: it belongs to the optimizer's arithmetic: a product, sum or norm over dims that
        the mesh splits. It reduces no gradients, and no kind of parallelism explains it.
      dcn: it goes between TPU slices; that part of a collective is a row of its own.
      taken: share of `trips` that is executed, mean over devices: below 1 in a branch of a pipeline
        schedule, whose table gives the share. Other branches count as always taken, so that
        their bytes are an upper bound.
      sources: the line of the user's code behind each of `operands`; None where it is unknown.
      ends: what each of `operands` lies between; empty if nobody looked.
      known_trips: the product of the loops around it whose trips are known.
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
    full_axes: bool
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
    sources: tuple[Source | None, ...] = ()
    ends: tuple[Ends, ...] = ()
    known_trips: int = 1

    def __post_init__(self) -> None:
        for text in self.operands:
            if not parse_shapes(text):
                raise ValueError(f"operand {text!r} of a {self.kind} is no array type")
        for name in ("sources", "ends"):
            if (given := len(getattr(self, name))) not in (0, len(self.operands)):
                operands = len(self.operands)
                raise ValueError(f"a {self.kind} of {operands} operands has {given} {name}")

    @property
    def source(self) -> Source | None:
        """The line of the user's code behind the largest of `operands`; None if unknown."""
        return self.sources[self.largest_operand] if self.sources else None

    @property
    def largest_operand(self) -> int:
        """Index of the largest of `operands`."""
        sizes = self.operand_bytes
        return max(range(len(sizes)), key=sizes.__getitem__)

    @property
    def operand_bytes(self) -> tuple[int, ...]:
        """Bytes of each of `operands`."""
        return tuple(parse_shapes(text)[0].nbytes for text in self.operands)

    @property
    def moves_matrices(self) -> bool:
        """It moves matrices of the optimizer to or from their owners, in place of products."""
        return self.by_optimizer and moves_matrices(self.op_name)

    @property
    def counted_trips(self) -> int:
        """`trips`; where they are unknown, `known_trips`."""
        return self.known_trips if self.trips is None else self.trips

    @property
    def runs(self) -> float:
        """Executions per step, mean over devices; a loop of unknown length counts once."""
        return self.counted_trips * self.taken

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
      problems: parts that could not be read. With any, totals are lower bounds; see `complete`.
    """

    rows: tuple[LedgerRow, ...]
    mesh: tuple[tuple[str, int], ...]
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every collective of the text was read with its trips: totals are not too low.

        They are exact unless `upper_bound`.
        """
        return not self.problems

    @property
    def upper_bound(self) -> bool:
        """A row is in a branch with an unknown share, which counts as always taken.

        So totals have both branches of a conditional, though a device takes only one.
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

    def __repr__(self) -> str:
        return f"Ledger({count(len(self), 'collective')}, {format_bytes(self.total())} sent)"

    def _repr_html_(self) -> str:
        """The collectives that send most."""
        rows = [
            (str(row), format_bytes(row.wire_bytes), str(row.source or ""))
            for row in sorted(self, key=lambda row: -row.wire_bytes)
        ]
        columns = ["collective", Column("sent", right=True), "source"]
        return notebook_html(repr(self), Table(columns, rows))

    def where(
        self,
        axis: str | Axes | None = None,
        kind: str | None = None,
        phase: str | None = None,
    ) -> list[LedgerRow]:
        """Selects rows by axis, kind and phase.

        Args:
          axis: a name: rows that span this axis, alone or with others. A tuple of names: rows
            that span exactly these, in any order.
          kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"`,
            `"collective-permute"`, …; underscores work as well as dashes.
          phase: `"forward"`, `"backward"`, `"recompute"`, `"update"` or `"other"`.

        Raises:
          ReportError: the mesh has no such axis, or the kind is unknown.
        """
        names = (axis,) if isinstance(axis, str) else axis or ()
        self._check_names(names, kind)
        kind = kind.replace("_", "-") if kind else None
        return [
            row
            for row in self.rows
            if (kind is None or row.kind == kind)
            and (phase is None or row.phase == phase)
            and (not isinstance(axis, str) or axis in row.axes)
            and (not isinstance(axis, tuple) or set(axis) == set(row.axes))
        ]

    def total(self, axis: str | Axes | None = None, kind: str | None = None) -> int:
        """Wire bytes per device and step of the rows of `where(axis, kind)`.

        A lower bound where `complete` is False.
        """
        return sum(row.wire_bytes for row in self.where(axis, kind))

    def by_axes(self) -> dict[Axes, int]:
        """Exact set of axes → wire bytes per device and step; the sum is `total()`."""
        sums: dict[Axes, int] = {}
        for row in self.rows:
            sums[row.axes] = sums.get(row.axes, 0) + row.wire_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def _check_names(self, axes: Axes, kind: str | None) -> None:
        names = [name for name, _ in self.mesh]
        for axis in axes:
            if axis not in names:
                hint = did_you_mean(axis, names)
                why = f"mesh {dict(self.mesh)} has no axis {axis!r}.{hint}"
                raise ReportError.of(_NO_ROW, f"axis={axis!r}", why, f"one of {', '.join(names)}")
        if kind is not None and kind.replace("_", "-") not in KINDS:
            why = f"There is no collective {kind!r}.{did_you_mean(kind, KINDS)}"
            raise ReportError.of(_NO_ROW, f"kind={kind!r}", why, f"one of {', '.join(KINDS)}")


def wire_bytes(kind: str, payload: int, group: int) -> float:
    """Bytes one device sends on a ring of `group` devices for one execution.

    Args:
      kind: one of `KINDS`.
      payload: bytes of the array; see `LedgerRow.payload_bytes`.
      group: devices in the ring.

    >>> wire_bytes("all-reduce", 1024, 4), wire_bytes("all-gather", 1024, 4)
    (1536.0, 768.0)
    >>> wire_bytes("collective-permute", 1024, 4)  # by a device that sends
    1024.0
    """
    if group < 2:
        return 0.0
    share = (group - 1) / group * payload
    if kind == "all-reduce":
        return 2 * share
    return float(payload) if kind == "collective-permute" else share


def read_ledger(
    hlo: str, mesh: Sequence[tuple[str, int]], dcn: Sequence[tuple[str, int]] = ()
) -> Ledger:
    """Reads the collectives of a compiled program.

    Args:
      hlo: `compiled.as_text()`.
      mesh: names and sizes of the mesh axes, in the mesh's order.
      dcn: names of the axes that cross slices, with the number of slices along each.
    """
    hlo = restore_paths(hlo)
    return build_ledger(parse(hlo), hlo, mesh, dcn)


def build_ledger(
    module: Module,
    hlo: str,
    mesh: Sequence[tuple[str, int]],
    dcn: Sequence[tuple[str, int]] = (),
) -> Ledger:
    """Reads the collectives of a parsed program; see `read_ledger`."""
    sites, problems = find_collectives(module, Slices(tuple(mesh), dict(dcn)))
    known = Sources(hlo, module)
    rows = tuple(
        row for site in sites for row in _split_by_dtype(site, _sources(site, module, known))
    )
    spelled = len(SPELLED.findall(_blank_strings(hlo)))
    # Between slices the text has host transfers, which `SPELLED` does not match.
    read = len({location for site in sites if not site.dcn for location in site.locations})
    if spelled > read:
        problems.append(f"{spelled - read} of {spelled} collectives in the text were not read")
    return Ledger(rows, tuple(mesh), tuple(dict.fromkeys(problems)))


def _blank_strings(hlo: str) -> str:
    """The text without the contents of quotes, which can look like anything."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', hlo)


def _sources(site: CollectiveSite, module: Module, known: Sources) -> tuple[Source | None, ...]:
    """The source of each array that a collective sends."""
    here, sent = find_fusion(module, module.computations[site.computation], site.instruction)
    sources = known.of_operands(sent, here) if sent is site.instruction else ()
    if len(sources) != len(site.operands):  # one operand can be a tuple of arrays
        sources = (known.of(sent, here),) * len(site.operands)
    return sources


def _split_by_dtype(site: CollectiveSite, sources: Sequence[Source | None]) -> Iterator[LedgerRow]:
    """Makes one row per dtype that a collective sends."""
    calls = site.path
    paths = split_op_name(calls.op_name)
    # A collective that the compiler combined has the path of each operand; any other has one path.
    if len(paths) != len(site.operands):
        paths = [calls.op_name] * len(site.operands)
    parts = list(zip(site.operands, paths, sources, strict=True))
    for dtype in dict.fromkeys(shape.dtype for shape in site.operands):
        sent = [part for part in parts if part[0].dtype == dtype]
        shapes = [shape for shape, _, _ in sent]
        largest_path = max(sent, key=lambda one: one[0].nbytes)[1]
        phase = phase_of(largest_path)
        payload = sum(shape.nbytes for shape in shapes)
        if site.kind == "all-gather":
            payload *= site.span.size
        times = calls.known_trips * calls.taken * site.span.senders
        yield LedgerRow(
            kind=site.kind,
            axes=site.span.axes,
            dtype=dtype,
            payload_bytes=payload,
            wire_bytes=round(wire_bytes(site.kind, payload, site.span.size) * times),
            trips=calls.trips,
            scope=scope_of(calls.op_name),
            phase=phase,
            overlapped=calls.overlapped,
            group=site.span.size,
            full_axes=site.span.full_axes,
            operands=tuple(map(str, shapes)),
            windowed=site.kind == "collective-permute"
            and not site.dcn
            and is_windowable(largest_path),
            conditional=calls.conditional,
            computation=site.computation,
            name=site.instruction.name,
            op_name=calls.op_name,
            phases=tuple(phase_of(path) for _, path, _ in sent),
            sources=tuple(source for _, _, source in sent),
            by_optimizer=phase == "update"
            and (combines_elements(largest_path) or moves_matrices(largest_path)),
            dcn=site.dcn,
            taken=float(calls.taken),
            known_trips=calls.known_trips,
        )
