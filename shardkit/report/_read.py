"""Reads everything that a report holds out of a compiled step."""

import time
from typing import TYPE_CHECKING

from .._core.versions import package_versions, utc_time
from ._data import ReportData
from .communication._minimum import compute_minima
from .communication._reductions import reductions_per_step
from .findings._excess import explain_excess
from .findings._findings import find_findings
from .memory._memory import read_memory
from .memory._peak import find_peak
from .memory._suggestions import suggest_memory_savings
from .time._flops import count_flops
from .time._timeline import model_time

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._program import Program


def read_program(program: "Program", chip: "str | Chip | None" = None) -> ReportData:
    """Reads a compiled step and models its time for a chip."""
    start, sizes, ledger = time.perf_counter(), program.sizes, program.ledger
    memory = read_memory(program)
    peak = find_peak(program, memory)
    findings = find_findings(program)
    flops = None if program.jaxpr is None else count_flops(program.jaxpr)
    return ReportData(
        mesh=program.mesh,
        platform=program.platform,
        device_kind=program.device_kind,
        ledger=ledger,
        memory=memory,
        peak=peak,
        flops=flops,
        findings=tuple(one for one in findings if one.fix),
        kept=tuple(one for one in findings if not one.fix),
        minima=explain_excess(program, compute_minima(program), findings),
        reductions={
            axis: reductions_per_step(ledger, axis, program.leaves, sizes)
            for axis in sizes
            if axis in program.batch_axes
        },
        leaves=tuple(leaf.layout(sizes) for leaf in program.leaves),
        notes=program.notes,
        memory_suggestions=tuple(suggest_memory_savings(memory, program.leaves, sizes, peak)),
        ticks=program.ticks,
        compiles=program.compiles,
        messages_complete=program.log_complete,
        timeline=model_time(program, ledger, flops, chip),
        made={"date": utc_time(), **package_versions()},
        seconds={**program.seconds, "read": time.perf_counter() - start},
    )
