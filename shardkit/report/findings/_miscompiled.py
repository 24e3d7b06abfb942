"""Programs that XLA's partitioner got wrong: parts that do not belong together are combined.

On data=2, fsdp=2, tensor=2, with rows over `("data", "fsdp")` and weights over fsdp and tensor, XLA
moves the rows of an operand of a product into the order `("fsdp", "data")` and takes the product
for one in the declared order (benchmarks/xla_faults.py).
"""

import math
from collections.abc import Iterator, Sequence

from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..hlo._hlo import Module, parse
from ..hlo._misaligned import Misaligned, find_misaligned
from ..hlo._parts import held_parts
from ..hlo._scope import scope_of
from ._finding import Finding

Mesh = tuple[tuple[str, int], ...]


def miscompiled(program: Program) -> Iterator[Finding]:
    """One finding for each instruction that combines parts of different rows or columns."""
    results = [leaf for leaf in program.leaves if leaf.donated]
    yield from _find(program.module, program.leaves, results, program.mesh)


def read_miscompiled(
    text: str, leaves: Sequence[PlacedLeaf], results: Sequence[PlacedLeaf], mesh: Mesh
) -> tuple[Finding, ...]:
    """Reads the findings of a compiled program of any function.

    Args:
      text: of the compiled program.
      leaves: its arguments, in order.
      results: its first results, in order.
      mesh: names and sizes of the mesh axes, in the order of the mesh.
    """
    return tuple(_find(parse(text), leaves, results, mesh))


def _find(
    module: Module, leaves: Sequence[PlacedLeaf], results: Sequence[PlacedLeaf], mesh: Mesh
) -> Iterator[Finding]:
    devices = module.num_partitions
    # A program for several slices is that of one slice.
    if devices != math.prod(size for _, size in mesh):
        return
    held = [
        [held_parts(leaf.leaf.shape, leaf.dims(), mesh) for leaf in of] for of in (leaves, results)
    ]
    for wrong in find_misaligned(module, held[0], held[1], devices):
        yield Finding(
            "miscompiled",
            scope=scope_of(wrong.instruction.op_name),
            bytes=wrong.shape.nbytes,
            why=_why(wrong, devices),
            fix=_fix(leaves),
        )


def _why(wrong: Misaligned, devices: int) -> str:
    operation = "/".join(wrong.instruction.op_name.split("/")[-2:]) or wrong.instruction.opcode
    return (
        f"{operation} combines parts of {wrong.shape} that start at other indices of dim "
        f"{wrong.dim} on {wrong.devices} of {devices} devices: XLA's partitioner lost the order of "
        "devices, and its numbers are wrong"
    )


def _fix(leaves: Sequence[PlacedLeaf]) -> str:
    """Suggests the order of axes in which a dim is split where fewer axes split another one."""
    entries = {axes: leaf for leaf in reversed(leaves) for axes in leaf.dims() if axes}
    for axes, leaf in entries.items():
        for first in entries:
            if set(first) < set(axes) and axes[: len(first)] != first:
                order = (*first, *(axis for axis in axes if axis not in first))
                spec = f"P({order!r})"
                return f"{spec} in place of P({axes!r}) for {leaf.part}, and for activations alike"
    return "another order of the mesh axes where several split one dim: P((a, b)) for P((b, a))"
