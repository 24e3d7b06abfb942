"""Refuses Fourier transforms that XLA's CPU backend compiles and cannot run.

It runs them on arrays in the order of their dims alone. Its layout pass gives some of them another
order, as here in the gradient of a transform whose product is split, and the run then ends with an
internal error that names no line:

    %fft.27 = c64[2,8,16]{1,0,2} fft(%copy.6), fft_type=IFFT     runs only as {2,1,0}
"""

import re

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, raise_all
from ..report.hlo._hlo import Instruction, parse
from ..report.hlo._source_lines import Sources
from ..rules import format_mesh

_LAYOUT = re.compile(r"\{([\d,]+)")


def check_transforms(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Raises StepError, with the user's lines, for transforms that devices would fail on."""
    if mesh.devices.flat[0].platform != "cpu" or " fft(" not in (text := compiled.as_text() or ""):
        return
    module = parse(text)
    sources = Sources(text, module)
    problems = [
        Problem(
            f"fft at {source}" if (source := sources.of(one, computation)) else one.op_name,
            f"is laid out as {one.type}, which XLA runs on no CPU device",
        )
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.opcode == "fft" and not _is_in_order(one)
    ]
    headline = f"A Fourier transform cannot run on mesh {format_mesh(mesh.shape)}."
    # XLA lays a transform out like the product that reads it.
    fix = "rules that leave the parameters of products beside the transform whole"
    raise_all(StepError, headline, list(dict.fromkeys(problems)), fix)


def _is_in_order(transform: Instruction) -> bool:
    layout = _LAYOUT.search(transform.type)
    dims = [int(dim) for dim in layout[1].split(",")] if layout else []
    return dims == sorted(dims, reverse=True)
