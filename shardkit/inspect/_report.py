"""`Report`: everything that a declaration became, to print, to save and to hold to a budget."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .._errors import ReportError
from ._budget import Budget, check
from ._findings import Finding, find_all
from ._flops import Flops, count_flops
from ._ledger import Ledger, Row, read_ledger
from ._memory import Memory, advice, read_memory
from ._minimum import Minimum, minimum
from ._program import Program
from ._reductions import reductions_per_step
from ._text import render

_SCHEMA, _VERSION = "shardkit.report", 1


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step is.

    Bytes and counts are *compiled*: read from the program that the compiler made for this
    platform. Nothing in here was measured by running it.

    Attributes:
      mesh: names and sizes of the mesh axes.
      platform: what it was compiled for: `"cpu"`, `"tpu"`, `"gpu"`.
      device_kind: the device's own name.
      ledger: every collective.
      memory: bytes per device.
      flops: FLOPs of a step, all devices together; None without a jaxpr.
      findings: what a user would want to know, the most bytes first.
      minima: textbook minimum of each axis whose kind is declared.
      reductions: axis that splits the batch → how often each gradient is reduced over it.
      advice: what would make a step that does not fit its device fit.
      compiles: how often the step was compiled.
      messages_complete: the compiler's messages are known, so that no finding is missing.
    """

    mesh: tuple[tuple[str, int], ...]
    platform: str
    device_kind: str
    ledger: Ledger
    memory: Memory
    flops: Flops | None
    findings: tuple[Finding, ...]
    minima: tuple[Minimum, ...] = ()
    reductions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    advice: tuple[str, ...] = ()
    compiles: int = 1
    messages_complete: bool = True

    @classmethod
    def of(cls, program: Program) -> "Report":
        """Reads a compiled step."""
        sizes = program.sizes
        ledger = read_ledger(program.hlo, program.mesh)
        memory = read_memory(program)
        rows_over = {axis for x in program.leaves if x.part == "batch" for axis in x.axes()}
        return cls(
            mesh=program.mesh,
            platform=program.platform,
            device_kind=program.device_kind,
            ledger=ledger,
            memory=memory,
            flops=None if program.jaxpr is None else count_flops(program.jaxpr),
            findings=find_all(program, ledger),
            minima=_minima(program, ledger),
            reductions={
                axis: reductions_per_step(ledger, axis, program.leaves, sizes)
                for axis in sizes
                if axis in rows_over
            },
            advice=tuple(advice(memory, program.leaves, sizes)),
            compiles=program.compiles,
            messages_complete=program.log_complete,
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read or counted; with any, some totals are lower bounds."""
        counted = self.flops.problems if self.flops else ()
        return self.ledger.problems + self.memory.problems + counted

    def check(self, budget: Budget) -> None:
        """Holds the step to a budget.

        Raises:
          BudgetError: something exceeds the budget, or cannot be told.
          ReportError: the budget names an axis, a kind or a finding that there is not.
        """
        check(self, budget)

    def __str__(self) -> str:
        """Tables of at most 100 columns, the most important first."""
        return render(self)

    def to_json(self) -> str:
        """Returns the report as JSON, in a schema that later versions can read."""
        flops = None
        if self.flops:
            scopes = [[*key, n] for key, n in self.flops.by_scope.items()]
            flops = {**_plain(self.flops), "by_scope": scopes}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {
            "ledger": {
                "rows": [_plain(row) for row in self.ledger],
                "problems": self.ledger.problems,
            },
            "memory": _plain(self.memory),
            "flops": flops,
            "findings": [_plain(finding) for finding in self.findings],
            "minima": [_plain(one) for one in self.minima],
            "reductions": dict(self.reductions),
        }
        return json.dumps({"schema": _SCHEMA, "version": _VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reopens what `to_json` wrote.

        Raises:
          ReportError: the text is no report, or of a version that this shardkit cannot read.
        """
        fields = _read(text)
        mesh = tuple((name, size) for name, size in fields["mesh"])
        ledger, flops = fields["ledger"], fields["flops"]
        rows = tuple(_made(Row, row) for row in ledger["rows"])
        if flops is not None:
            by_scope = {(scope, phase): n for scope, phase, n in flops["by_scope"]}
            flops = _made(Flops, {**flops, "by_scope": by_scope})
        fields |= {
            "mesh": mesh,
            "ledger": Ledger(rows, mesh, tuple(ledger["problems"])),
            "memory": _made(Memory, fields["memory"]),
            "flops": flops,
            "findings": tuple(_made(Finding, one) for one in fields["findings"]),
            "minima": tuple(_made(Minimum, one) for one in fields["minima"]),
            "advice": tuple(fields["advice"]),
        }
        return cls(**fields)


def _minima(program: Program, ledger: Ledger) -> tuple[Minimum, ...]:
    sizes, kinds = program.sizes, program.declared.kinds
    known = {axis: minimum(axis, sizes, program.leaves, program.declared) for axis in kinds}
    return tuple(
        Minimum(axis, kinds[axis], least, ledger.total(axis))
        for axis, least in known.items()
        if least is not None
    )


def _plain(one: Any) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}


def _made(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """Builds a dataclass from JSON, whose lists were tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _read(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"This is no report: {error}. Save one with report.to_json().") from None
    if not isinstance(fields, dict) or fields.pop("schema", None) != _SCHEMA:
        raise ReportError("This is no report of shardkit. Save one with report.to_json().")
    version = fields.pop("version")
    if version != _VERSION:
        raise ReportError(f"This report has version {version}; this shardkit reads {_VERSION}.")
    return fields
