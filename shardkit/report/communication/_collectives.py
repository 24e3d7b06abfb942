"""Walks a compiled program from its entry and finds every collective it executes."""

import dataclasses
import fractions
import math
import re
from collections.abc import Iterator

from ..._core.scope_markers import branch_shares
from ..hlo._groups import Span, read_groups, read_pairs, span_of_groups, span_of_pairs
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._op_paths import Origins
from ..hlo._scope import scope_of
from ..hlo._slices import Slices, arrival, crosses, kind_between
from ..hlo._trips import Loops

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# A collective as it stands in the text, independent of the parser that is checked against it.
SPELLED = re.compile(r"[\])}] (?:" + "|".join(KINDS) + r")(?:-start)?\(")

# Attributes of what moves data between devices, and calls of the libraries that do.
_BETWEEN_DEVICES = ("replica_groups=", "source_target_pairs=", "channel_id=")
_LIBRARY = re.compile(
    r'custom_call_target="[^"]*(?:[nr]ccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all)',
    re.IGNORECASE,
)

# Compute that can hide a transfer; everything else in a schedule is bookkeeping or memory traffic.
_COMPUTE = frozenset(
    "fusion dot convolution custom-call while call conditional reduce sort scatter gather".split()
)
# Computations that these name are run once per execution; others name a scalar combiner.
_RUNS = frozenset({"fusion", "call", "async-start", "custom-call", "conditional", "while"})
_COMBINERS = frozenset(
    "reduce reduce-window scatter sort map select-and-scatter all-reduce reduce-scatter "
    "all-reduce-start reduce-scatter-start topk".split()
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A collective and how the program reaches it; see `Row` for the words.

    Attributes:
      dcn: it goes between slices.
      steps: where else it is spelled: the TPU compiler moves a collective on in pieces, behind
        the compute of a chain of fusions each of which holds a copy of it.
    """

    kind: str
    instruction: Instruction
    computation: str
    operands: tuple[Shape, ...]
    span: Span
    trips: int | None
    conditional: bool
    taken: fractions.Fraction
    overlapped: bool
    op_name: str
    dcn: bool = False
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(computation, instruction) of everything in the text that is this collective."""
        return ((self.computation, self.instruction.name), *self.steps)

    @property
    def scope(self) -> str:
        """The model's scope."""
        return scope_of(self.op_name)


@dataclasses.dataclass(frozen=True)
class _Path:
    """How the walk came to a computation."""

    trips: int | None = 1
    conditional: bool = False
    taken: fractions.Fraction = fractions.Fraction(1)
    overlapped: bool = False
    op_name: str = ""


def find(module: Module, slices: Slices) -> tuple[list[Found], list[str]]:
    """Finds the collectives of a program, and what of it could not be read."""
    walk = _Walk(module, slices)
    walk.problems += _other_devices(module, slices)
    found = list(walk.computation(module.entry, _Path())) if module.entry else []
    reached = {place for one in found for place in one.places} | walk.unread
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            known = (computation.name, instruction.name) in reached
            if not known and kind_of(instruction):
                walk.problems.append(f"nothing runs {instruction.name} of {computation.name}")
    return found, [*module.problems, *walk.problems]


def _other_devices(module: Module, slices: Slices) -> Iterator[str]:
    """Whether the program is one for this mesh, as far as its header says."""
    whole = math.prod(size for _, size in slices.mesh)
    inside = math.prod(size for _, size in slices.inside)
    if "num_partitions=" in module.header and module.num_partitions not in (whole, inside):
        yield f"the program is one for {module.num_partitions} devices, the mesh has {whole}"


def kind_of(instruction: Instruction) -> str | None:
    """The collective that an instruction starts; None if it is none, or only ends one."""
    if crosses(instruction):
        return kind_between(instruction)
    base = instruction.opcode.removesuffix("-start")
    return base if base in KINDS else None


class _Walk:
    """Follows calls through one module, multiplying trips on the way."""

    def __init__(self, module: Module, slices: Slices) -> None:
        self._module = module
        self._slices = slices
        # The program of several slices is that of one, and numbers only its devices.
        devices = math.prod(size for _, size in slices.inside)
        self._of_slice = bool(slices.dcn) and module.num_partitions == devices
        self._mesh = slices.inside if self._of_slice else slices.mesh
        self._loops = Loops(module)
        self._origins = Origins(module)
        self.problems: list[str] = []
        self.unread: set[tuple[str, str]] = set()

    def computation(self, name: str, path: _Path) -> Iterator[Found]:
        """Collectives of a computation and of everything it calls."""
        here = self._module.computations.get(name)
        if here is None:
            self.problems.append(f"computation {name} is called but not in the text")
            return
        chains: dict[str, list[Found]] = {}
        for instruction in here.instructions.values():
            if kind := kind_of(instruction):
                found = self._collective(kind, instruction, here, path)
                yield from [found] if found else []
            elif self._unknown(instruction):
                where = f"{instruction.opcode} {instruction.name}"
                self.problems.append(f"{where}: an unknown kind of collective")
            elif instruction.calls:
                for found in self._called(instruction, here, path):
                    if instruction.opcode == "fusion" and (channel := _chain(found)):
                        chains.setdefault(channel, []).append(found)
                    else:
                        yield found
        yield from map(_joined, chains.values())

    def _unknown(self, instruction: Instruction) -> bool:
        """Whether something that is not known moves data between devices."""
        if instruction.opcode.endswith(("-done", "-update")) or instruction.opcode == "recv":
            return False
        if instruction.opcode == "custom-call":
            return bool(_LIBRARY.search(instruction.rest))
        if instruction.opcode == "send":
            return crosses(instruction) or "_xla_send_recv_source_target_pairs" in instruction.rest
        return any(name in instruction.rest for name in _BETWEEN_DEVICES)

    def _called(self, call: Instruction, here: Computation, path: _Path) -> Iterator[Found]:
        """Collectives of the computations that an instruction runs."""
        if call.opcode in _COMBINERS or call.opcode.endswith(("-update", "-done")):
            return
        known = call.opcode in _RUNS or call.opcode.endswith("-start")
        inner = dataclasses.replace(
            path,
            op_name=call.op_name or self._origins.of(call, here) or path.op_name,
            conditional=path.conditional or call.opcode == "conditional",
            overlapped=path.overlapped or self._overlapped(call, here),
        )
        often = _often(call)
        for at, (key, callee) in enumerate(call.calls):
            after = inner
            if call.opcode == "while":
                after = dataclasses.replace(inner, trips=self._trips(call, here, path, key))
            elif often:
                after = dataclasses.replace(inner, taken=path.taken * often[at])
            found = list(self.computation(callee, after))
            if found and not known:
                self.problems.append(f"{call.opcode} {call.name} runs collectives: unknown trips")
            if found and after.trips is None and path.trips is not None:
                self.problems.append(
                    f"loop {call.name} runs {len(found)} collectives an unknown number of times; "
                    "each is counted once"
                )
            yield from found

    def _trips(self, loop: Instruction, here: Computation, path: _Path, key: str) -> int | None:
        """Executions per step of a loop's body or condition."""
        trips = self._loops.trips(here.name, loop.name)
        if trips is None or path.trips is None:
            return None
        return path.trips * (trips + 1 if key == "condition" else trips)

    def _collective(
        self, kind: str, instruction: Instruction, here: Computation, path: _Path
    ) -> Found | None:
        try:
            span = self._span(kind, instruction)
            shapes = [s for name in instruction.operands for s in _shapes(here, name)]
            operands = tuple(shape for shape in shapes if shape.dtype != "token")
            if kind == "ragged-all-to-all":
                # Rows and the room for those that come; then sizes and offsets. Of the larger one
                # a part is empty: as many rows come as go, mean over devices.
                operands = (min(operands[:2], key=lambda shape: shape.nbytes),)
            if strange := [shape for shape in operands if not shape.known]:
                raise ValueError(f"{strange[0]} has an unknown element type")
        except (ValueError, KeyError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            self.problems.append(f"{kind} {instruction.name}: {why}")
            self.unread.add((here.name, instruction.name))
            return None
        # The TPU compiler spells a reduce-scatter as a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and here.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        return Found(
            kind=kind,
            instruction=instruction,
            computation=here.name,
            operands=operands,
            span=span,
            trips=path.trips,
            conditional=path.conditional,
            taken=path.taken,
            overlapped=path.overlapped or self._overlapped(instruction, here),
            op_name=instruction.op_name or self._origins.of(instruction, here) or path.op_name,
            dcn=crosses(instruction),
        )

    def _span(self, kind: str, instruction: Instruction) -> Span:
        """Mesh axes of a collective."""
        if crosses(instruction):
            return self._slices.between(instruction)
        found = self._span_of_devices(kind, instruction)
        return self._slices.within(found) if self._of_slice else found

    def _span_of_devices(self, kind: str, instruction: Instruction) -> Span:
        attrs = instruction.attrs
        if kind == "collective-permute":
            pairs = read_pairs(attrs["source_target_pairs"])
            return span_of_pairs(pairs, self._mesh)
        devices = self._module.num_partitions
        # Without use_global_device_ids the groups of these three number replicas, of which an
        # SPMD program has one: with a channel all its partitions take part, without one none do.
        by_replica = kind in ("all-reduce", "all-gather", "reduce-scatter")
        if by_replica and attrs.get("use_global_device_ids") != "true":
            groups = "{}" if "channel_id" in attrs else "{{0}}"
        else:
            groups = attrs.get("replica_groups", "{}")
        return span_of_groups(read_groups(groups, devices), self._mesh)

    def _overlapped(self, start: Instruction, here: Computation) -> bool:
        """Whether the schedule runs compute between a `-start` and its `-done`."""
        sent = arrival(start, here) if crosses(start) else None
        if not (self._module.scheduled and (sent or start.opcode.endswith("-start"))):
            return False
        names = list(here.instructions)
        between = False
        pending = {sent or start.name}
        for name in names[names.index(start.name) + 1 :]:
            instruction = here.instructions[name]
            if pending & set(instruction.operands):
                if instruction.opcode.endswith("-done"):
                    return between
                pending.add(name)
            elif instruction.opcode in _COMPUTE and not self._only_moves(instruction):
                between = True
        return False

    def _only_moves(self, instruction: Instruction) -> bool:
        """Whether a fusion is itself a collective."""
        for _, callee in instruction.calls:
            called = self._module.computations.get(callee)
            if called and any(kind_of(inner) for inner in called.instructions.values()):
                return instruction.opcode == "fusion"
        return False


def _often(call: Instruction) -> tuple[fractions.Fraction, ...] | None:
    """Shares in which a conditional runs each of its `calls`; None where nothing is known."""
    found = branch_shares(call.op_name, len(call.calls)) if call.opcode == "conditional" else None
    if found is None:
        return None
    # Branch 1 of two comes first where a truth value decides.
    return found[::-1] if call.calls[0][0] == "true_computation" else found


def _chain(found: Found) -> str:
    """The channel of a collective that a chain of fusions moves on; "" for any other."""
    chained = "async_collective_fusion_config" in found.instruction.rest
    return found.instruction.attrs.get("channel_id", "") if chained else ""


def _joined(steps: list[Found]) -> Found:
    """The one collective that the copies in a chain of fusions are.

    Between the first and the last, which only start and end it, stands the compute that hides it.
    """
    first, *rest = steps
    return dataclasses.replace(
        first,
        overlapped=first.overlapped or len(steps) > 2,
        steps=tuple((one.computation, one.instruction.name) for one in rest),
    )


def _shapes(here: Computation, name: str) -> tuple[Shape, ...]:
    """Arrays of an operand."""
    if name not in here.instructions:
        raise ValueError(f"operand {name} is not in the text")
    return here.instructions[name].shapes
