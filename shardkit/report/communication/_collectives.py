"""Walks a compiled program from its entry and finds every collective that it executes."""

import dataclasses
import fractions
import math
import re
from collections.abc import Iterator

from ..._core.scope_markers import branch_shares
from ..hlo._groups import Span, read_groups, read_pairs, span_of_groups, span_of_pairs
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._neighbours import OpPaths
from ..hlo._slices import Slices, crosses_slices, find_recv, kind_of_transfer
from ..hlo._trips import TripCounts

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# A collective in the program's text; the ledger counts these matches to check the parser.
SPELLED = re.compile(r"[\])}] (?:" + "|".join(KINDS) + r")(?:-start)?\(")

# Attributes of instructions that move data between devices, and calls of communication libraries.
_BETWEEN_DEVICES = ("replica_groups=", "source_target_pairs=", "channel_id=")
_LIBRARY = re.compile(
    r'custom_call_target="[^"]*(?:[nr]ccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all)',
    re.IGNORECASE,
)

# Operations that can hide a transfer; all others are bookkeeping or memory traffic.
_COMPUTE = frozenset(
    "fusion dot convolution custom-call while call conditional reduce sort scatter gather".split()
)
# These run the computations that they name; `_COMBINERS` name one that combines two scalars.
_RUNS = frozenset({"fusion", "call", "async-start", "custom-call", "conditional", "while"})
_COMBINERS = frozenset(
    "reduce reduce-window scatter sort map select-and-scatter all-reduce reduce-scatter "
    "all-reduce-start reduce-scatter-start topk".split()
)


@dataclasses.dataclass(frozen=True)
class CallPath:
    """The calls through which a program reaches an instruction; see `LedgerRow` for the fields."""

    trips: int | None = 1
    known_trips: int = 1
    conditional: bool = False
    taken: fractions.Fraction = fractions.Fraction(1)
    overlapped: bool = False
    op_name: str = ""


@dataclasses.dataclass(frozen=True)
class CollectiveSite:
    """A collective and how the program reaches it; see `LedgerRow` for the fields."""

    kind: str
    instruction: Instruction
    computation: str
    operands: tuple[Shape, ...]
    span: Span
    path: CallPath  # the calls to it; `overlapped` and `op_name` are its own
    dcn: bool = False  # it crosses slices
    # its other (computation, instruction): the TPU compiler runs a collective in pieces behind the
    # compute of a chain of fusions, each of which has a copy of it
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def locations(self) -> tuple[tuple[str, str], ...]:
        """(computation, instruction) of the collective and of its copies."""
        return ((self.computation, self.instruction.name), *self.copies)


def find_collectives(module: Module, slices: Slices) -> tuple[list[CollectiveSite], list[str]]:
    """Finds the collectives of a program, and the problems in reading it."""
    walk = _CallWalk(module, slices)
    walk.problems += _check_device_count(module, slices)
    sites = list(walk.visit(module.entry, CallPath())) if module.entry else []
    reached = {location for site in sites for location in site.locations} | walk.unread
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if (computation.name, instruction.name) not in reached and collective_kind(instruction):
                walk.problems.append(f"nothing runs {instruction.name} of {computation.name}")
    return sites, [*module.problems, *walk.problems]


def _check_device_count(module: Module, slices: Slices) -> Iterator[str]:
    """Checks the number of devices in the program's header against the mesh."""
    whole = math.prod(size for _, size in slices.mesh)
    inside = math.prod(size for _, size in slices.slice_mesh)
    if "num_partitions=" in module.header and module.num_partitions not in (whole, inside):
        yield f"the program is for {module.num_partitions} devices, the mesh has {whole}"


def collective_kind(instruction: Instruction) -> str | None:
    """The collective that an instruction starts; None for others, also for one that ends it."""
    if crosses_slices(instruction):
        return kind_of_transfer(instruction)
    base = instruction.opcode.removesuffix("-start")
    return base if base in KINDS else None


class _CallWalk:
    """Follows the calls of one module and multiplies trips on the way."""

    def __init__(self, module: Module, slices: Slices) -> None:
        self._module = module
        self._slices = slices
        # A program for several slices is the program of one, and numbers the devices of one.
        devices = math.prod(size for _, size in slices.slice_mesh)
        self._of_slice = bool(slices.dcn) and module.num_partitions == devices
        self._mesh = slices.slice_mesh if self._of_slice else slices.mesh
        self._loops = TripCounts(module)
        self._origins = OpPaths(module)
        self.problems: list[str] = []
        self.unread: set[tuple[str, str]] = set()

    def visit(self, name: str, path: CallPath) -> Iterator[CollectiveSite]:
        """Collectives of a computation and of all that it calls."""
        here = self._module.computations.get(name)
        if here is None:
            self.problems.append(f"computation {name} is called but not in the text")
            return
        chains: dict[str, list[CollectiveSite]] = {}
        for instruction in here.instructions.values():
            if kind := collective_kind(instruction):
                site = self._read_site(kind, instruction, here, path)
                yield from [site] if site else []
            elif self._is_unknown_collective(instruction):
                where = f"{instruction.opcode} {instruction.name}"
                self.problems.append(f"{where}: an unknown kind of collective")
            elif instruction.calls:
                for site in self._visit_calls(instruction, here, path):
                    if instruction.opcode == "fusion" and (channel := _chain_channel(site)):
                        chains.setdefault(channel, []).append(site)
                    else:
                        yield site
        yield from map(_merge_chain, chains.values())

    def _is_unknown_collective(self, instruction: Instruction) -> bool:
        """Whether an instruction moves data between devices and is not a known collective."""
        if instruction.opcode.endswith(("-done", "-update")) or instruction.opcode == "recv":
            return False
        if instruction.opcode == "custom-call":
            return bool(_LIBRARY.search(instruction.rest))
        if instruction.opcode == "send":
            return (
                crosses_slices(instruction)
                or "_xla_send_recv_source_target_pairs" in instruction.rest
            )
        return any(name in instruction.rest for name in _BETWEEN_DEVICES)

    def _visit_calls(
        self, call: Instruction, here: Computation, path: CallPath
    ) -> Iterator[CollectiveSite]:
        """Collectives of the computations that an instruction runs."""
        if call.opcode in _COMBINERS or call.opcode.endswith(("-update", "-done")):
            return
        known = call.opcode in _RUNS or call.opcode.endswith("-start")
        inner = self._extend(path, call, here)
        inner = dataclasses.replace(
            inner, conditional=path.conditional or call.opcode == "conditional"
        )
        shares = _branch_shares(call)
        for at, (key, callee) in enumerate(call.calls):
            callee_path = inner
            if call.opcode == "while":
                callee_path = self._in_loop(call, here, inner, key)
            elif shares:
                callee_path = dataclasses.replace(inner, taken=path.taken * shares[at])
            sites = list(self.visit(callee, callee_path))
            if sites and not known:
                self.problems.append(f"{call.opcode} {call.name} runs collectives: unknown trips")
            if sites and callee_path.trips is None and path.trips is not None:
                self.problems.append(
                    f"loop {call.name} runs {len(sites)} collectives an unknown number of times; "
                    "each is counted once for each run of the loop"
                )
            yield from sites

    def _extend(self, path: CallPath, instruction: Instruction, here: Computation) -> CallPath:
        return dataclasses.replace(
            path,
            op_name=instruction.op_name or self._origins.of(instruction, here) or path.op_name,
            overlapped=path.overlapped or self._is_overlapped(instruction, here),
        )

    def _in_loop(self, loop: Instruction, here: Computation, path: CallPath, key: str) -> CallPath:
        """The path into a loop's body or condition; a loop of unknown length counts once."""
        trips = self._loops.trips(here.name, loop.name)
        if trips is None:
            return dataclasses.replace(path, trips=None)
        trips += key == "condition"
        product = None if path.trips is None else path.trips * trips
        return dataclasses.replace(path, trips=product, known_trips=path.known_trips * trips)

    def _read_site(
        self, kind: str, instruction: Instruction, here: Computation, path: CallPath
    ) -> CollectiveSite | None:
        try:
            span = self._read_span(kind, instruction)
            shapes = [s for name in instruction.operands for s in _operand_shapes(here, name)]
            operands = tuple(shape for shape in shapes if shape.dtype != "token")
            if kind == "ragged-all-to-all":
                # Operands: rows to send, a buffer for received rows, then sizes and offsets.
                # Averaged over devices as many rows arrive as leave, so the smaller one is full.
                operands = (min(operands[:2], key=lambda shape: shape.nbytes),)
            if unknown := [shape for shape in operands if not shape.known]:
                raise ValueError(f"{unknown[0]} has an unknown element type")
        except (ValueError, KeyError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            self.problems.append(f"{kind} {instruction.name}: {why}")
            self.unread.add((here.name, instruction.name))
            return None
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and here.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        return CollectiveSite(
            kind=kind,
            instruction=instruction,
            computation=here.name,
            operands=operands,
            span=span,
            path=self._extend(path, instruction, here),
            dcn=crosses_slices(instruction),
        )

    def _read_span(self, kind: str, instruction: Instruction) -> Span:
        """Reads the mesh axes of a collective."""
        if crosses_slices(instruction):
            return self._slices.read_span(instruction)
        span = self._read_device_span(kind, instruction)
        return self._slices.to_mesh_span(span) if self._of_slice else span

    def _read_device_span(self, kind: str, instruction: Instruction) -> Span:
        attrs = instruction.attrs
        if kind == "collective-permute":
            pairs = read_pairs(attrs["source_target_pairs"])
            return span_of_pairs(pairs, self._mesh)
        devices = self._module.num_partitions
        # Without use_global_device_ids the groups of these three number replicas. An SPMD program
        # has one replica: with a channel id all partitions take part, without one only itself.
        by_replica = kind in ("all-reduce", "all-gather", "reduce-scatter")
        if by_replica and attrs.get("use_global_device_ids") != "true":
            groups = "{}" if "channel_id" in attrs else "{{0}}"
        else:
            groups = attrs.get("replica_groups", "{}")
        return span_of_groups(read_groups(groups, devices), self._mesh)

    def _is_overlapped(self, start: Instruction, here: Computation) -> bool:
        """Whether the schedule runs compute between a `-start` and its `-done`."""
        sent = find_recv(start, here) if crosses_slices(start) else None
        if not (self._module.scheduled and (sent or start.opcode.endswith("-start"))):
            return False
        between = False
        pending = {sent or start.name}
        for instruction in here.after(start.name):
            if pending & set(instruction.operands):
                if instruction.opcode.endswith("-done"):
                    return between
                pending.add(instruction.name)
            elif instruction.opcode in _COMPUTE and not self._holds_collective(instruction):
                between = True
        return False

    def _holds_collective(self, instruction: Instruction) -> bool:
        """Whether an instruction is a fusion with a collective in it."""
        for _, callee in instruction.calls:
            called = self._module.computations.get(callee)
            if called and any(collective_kind(inner) for inner in called.instructions.values()):
                return instruction.opcode == "fusion"
        return False


def _branch_shares(call: Instruction) -> tuple[fractions.Fraction, ...] | None:
    """How often a conditional takes each of its `calls`, as shares; None if unknown."""
    shares = branch_shares(call.op_name, len(call.calls)) if call.opcode == "conditional" else None
    if shares is None:
        return None
    # With a boolean predicate the true branch, number 1, is called first.
    return shares[::-1] if call.calls[0][0] == "true_computation" else shares


def _chain_channel(site: CollectiveSite) -> str:
    """The channel of a collective that a chain of fusions runs; "" for any other."""
    chained = "async_collective_fusion_config" in site.instruction.rest
    return site.instruction.attrs.get("channel_id", "") if chained else ""


def _merge_chain(chain: list[CollectiveSite]) -> CollectiveSite:
    """Merges the copies of a collective in a chain of fusions into one.

    The first and the last fusion start and end it; those between have the compute that hides it.
    """
    first, *others = chain
    overlapped = first.path.overlapped or len(chain) > 2
    return dataclasses.replace(
        first,
        path=dataclasses.replace(first.path, overlapped=overlapped),
        copies=tuple((site.computation, site.instruction.name) for site in others),
    )


def _operand_shapes(here: Computation, name: str) -> tuple[Shape, ...]:
    """Result arrays of the instruction that an operand names."""
    if name not in here.instructions:
        raise ValueError(f"operand {name} is not in the text")
    return here.instructions[name].shapes
