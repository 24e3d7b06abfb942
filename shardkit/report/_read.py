"""Reads everything that a report holds out of a compiled step."""

import time
from typing import TYPE_CHECKING, Any

from .communication._ledger import ledger_of
from .communication._minimum import minima
from .communication._reductions import reductions_per_step
from .findings._findings import find_all
from .memory._layouts import layouts
from .memory._memory import read_memory
from .memory._peak import peak_of
from .memory._suggestions import advice
from .time._flops import count_flops
from .time._timeline import model_time

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._program import Program


def read(program: "Program", chip: "str | Chip | None" = None) -> dict[str, Any]:
    """Returns the fields of the `Report` of a compiled step, its time modelled for a chip."""
    start, sizes = time.perf_counter(), program.sizes
    ledger = ledger_of(program.module, program.hlo, program.mesh, program.dcn)
    memory = read_memory(program)
    peak = peak_of(program, memory)
    flops = None if program.jaxpr is None else count_flops(program.jaxpr)
    rows_over = {axis for x in program.leaves if x.part == "batch" for axis in x.axes()}
    fields = {
        "mesh": program.mesh,
        "platform": program.platform,
        "device_kind": program.device_kind,
        "ledger": ledger,
        "memory": memory,
        "peak": peak,
        "flops": flops,
        "findings": find_all(program, ledger),
        "minima": minima(program, ledger),
        "reductions": {
            axis: reductions_per_step(ledger, axis, program.leaves, sizes)
            for axis in sizes
            if axis in rows_over
        },
        "leaves": layouts(program),
        "advice": tuple(advice(memory, program.leaves, sizes, peak)),
        "compiles": program.compiles,
        "messages_complete": program.log_complete,
        "timeline": model_time(program, ledger, flops, chip),
    }
    return fields | {"seconds": {**program.seconds, "read": time.perf_counter() - start}}
