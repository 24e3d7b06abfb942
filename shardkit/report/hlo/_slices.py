"""Reads the traffic between TPU slices from their compiler's host transfers.

A program for several slices is the program of one slice: its groups number the devices of a slice.
Traffic between slices is a pair of host transfers, `send` and `recv`, which the runtime executes as
a collective. The `send` has its kind and its groups:

* `{{100000,300000},{100001,300001}}`: groups of devices, 100000 · (slice + 1) + device;
* `{{100000->300000},{300000->100000}}`: pairs of source and target;
* `{1,2}x{0:7}`: slices 1 and 2, counted from 1, each device with those of the same number.
"""

import dataclasses
import fractions
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ._groups import Span, span_of_groups
from ._hlo import Computation, Instruction

_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target=(?:"\{([\d,]+)\}x|\{(\{.*?\})\})')
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_SLICE = 100_000


def crosses_slices(instruction: Instruction) -> bool:
    """Whether an instruction sends data to another slice."""
    return instruction.opcode == "send" and "_xla_megascale_" in instruction.rest


def kind_of_transfer(instruction: Instruction) -> str | None:
    """The collective that a `send` between slices implements; None if unknown."""
    match = _TYPE.search(instruction.rest)
    return _KINDS.get(match.group(1)) if match else None


def find_recv(send: Instruction, here: Computation) -> str | None:
    """Name of the `recv` that receives the result of a `send` between slices."""
    return next((recv.name for recv in _matching_transfers(send, here, "recv")), None)


def sent_operands(recv: Instruction, here: Computation) -> tuple[str, ...]:
    """Names of the operands of the `send` whose result a `recv` receives."""
    return next((send.operands for send in _matching_transfers(recv, here, "send")), ())


def _matching_transfers(
    transfer: Instruction, here: Computation, opcode: str
) -> Iterator[Instruction]:
    rendezvous = _MEETING.search(transfer.rest)
    for other in here.instructions.values():
        match = _MEETING.search(other.rest) if other.opcode == opcode else None
        if rendezvous and match and match.group(1) == rendezvous.group(1):
            yield other


@dataclasses.dataclass(frozen=True)
class Slices:
    """How a mesh is laid out on slices."""

    mesh: tuple[tuple[str, int], ...]  # names and sizes of the mesh axes, in the mesh's order
    # mesh axis → slices along it, for the axes that cross slices. Slices are numbered in the order
    # of the mesh.
    dcn: Mapping[str, int]

    @property
    def slice_mesh(self) -> tuple[tuple[str, int], ...]:
        """The part of the mesh within one slice."""
        return tuple((axis, size // self.dcn.get(axis, 1)) for axis, size in self.mesh)

    def to_mesh_span(self, span: Span) -> Span:
        """Converts a span within a slice to one of the whole mesh."""
        full_axes = span.full_axes and not set(span.axes) & set(self.dcn)
        return dataclasses.replace(span, full_axes=full_axes)

    def read_span(self, send: Instruction) -> Span:
        """The mesh axes that a `send` between slices goes over; raises ValueError if unknown."""
        grid = [(axis, self.dcn[axis]) for axis, _ in self.mesh if axis in self.dcn]
        groups = _groups(send)
        span = span_of_groups(groups, grid)
        inner = dict(self.slice_mesh)
        full_axes = all(inner[axis] == 1 for axis in span.axes)
        if kind_of_transfer(send) != "collective-permute":
            return dataclasses.replace(span, full_axes=full_axes)
        devices = math.prod(size for _, size in self.mesh)
        senders = fractions.Fraction(len(groups), devices)
        return dataclasses.replace(span, full_axes=full_axes, senders=senders)


def _groups(send: Instruction) -> Sequence[np.ndarray]:
    """Slices that exchange data with each other, counted from 0."""
    match = _TARGET.search(send.rest)
    if match is None:
        raise ValueError("its slices are not in a known form")
    if match.group(1):
        return [np.array([int(number) - 1 for number in match.group(1).split(",")])]
    groups = re.findall(r"\{([\d,>\-]+)\}", match.group(2))
    ids = [[int(number) for number in re.findall(r"\d+", group)] for group in groups]
    return [np.array(group) // _SLICE - 1 for group in ids]
