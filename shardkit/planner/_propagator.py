"""One walk through a flat program: what it computes, sends and holds, for every mesh at once.

It does what a partitioner does, by names alone: an operand that lies as a parameter does is
gathered where it is used, a product over a dim that is split gives a sum that is made where a
constraint or a parameter's own layout asks for it, and what else disagrees is gathered.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from ._attention_costs import attention_costs
from ._buffer_lifetimes import BufferLifetimes
from ._costs import PHASES, PIPE, Collective, Compute, MatmulDims, matmul_dims
from ._dataflow import (
    Dims,
    find_accumulator,
    find_narrowed,
    find_readers,
    propagate_backward,
    refines,
    splits_more,
)
from ._program import FlatProgram, Op
from ._propagation import (
    KEEPS_PARTIAL,
    MATERIALIZED,
    REDUCTIONS,
    conflicting_axes,
    contract,
    propagate,
    shard_scatter,
)
from ._region_probe import ATTENTION_BACKWARD, ATTENTION_FORWARD
from ._symbolic_sharding import (
    MICRO,
    Axes,
    SymbolicBytes,
    SymbolicSharding,
    add_bytes,
    drop_repeated_axes,
    padding_factor,
    replicated,
    symbolic_bytes,
)

Resolve = Callable[[tuple[str | None, ...], tuple[int, ...]], Dims]


@dataclasses.dataclass
class Propagator:
    """A walk through a program.

    Attributes:
      resolve: logical names and shape → the mesh axes that split each dim.
      lanes: elements that a device's memory lays side by side: tiles are filled up to that.
      way: how attention looks along a split length.
      sent: collectives found.
      work: products and writes found.
      part: where in `PHASES` the walk is; it moves on only where layers are split over stages.
      message: bytes that go from layer to layer.
    """

    resolve: Resolve
    lanes: int = 1
    way: str = ""
    sent: list[Collective] = dataclasses.field(default_factory=list)
    work: list[Compute] = dataclasses.field(default_factory=list)
    part: int = 0
    message: SymbolicBytes = dataclasses.field(default_factory=dict)

    def run(
        self,
        flat: FlatProgram,
        ins: Sequence[SymbolicSharding],
        wants: Sequence[Dims | None],
        trips: float = 1.0,
        loops: frozenset[str] = frozenset(),
        returned: int | None = None,
    ) -> tuple[list[SymbolicSharding], list[SymbolicBytes]]:
        """Walks through; returns the layout of each result, and bytes alive at each operation.

        `returned` is the number of results that live to the end; all, unless it is given.
        """
        body = _Body(self, flat, trips, loops)
        spare = flat.inputs[: len(flat.inputs) - len(ins)]  # constants that the trace captured
        body.env.update((n, replicated(len(flat.avals[n].shape))) for n in spare)
        body.env.update(zip(flat.inputs[len(spare) :], ins, strict=True))
        body.wants = propagate_backward(flat, wants)
        for at, op in enumerate(flat.ops):
            body.step(at, op)
        outs = [body.result(number) for number in flat.outputs]
        return outs, body.lifetimes.alive(len(outs) if returned is None else returned)


class _Body:
    """The values of one program while it is walked through."""

    def __init__(
        self, walk: Propagator, flat: FlatProgram, trips: float, loops: frozenset[str]
    ) -> None:
        self.walk, self.flat, self.trips, self.loops = walk, flat, trips, loops
        self.env: dict[int, SymbolicSharding] = {}
        self.wants: Mapping[int, Dims] = {}
        self.lifetimes = BufferLifetimes(flat)
        self.unsummed: dict[int, float] = {}  # bytes per element of what is cast before its sum
        self.readers = find_readers(flat)
        self.narrow = find_narrowed(flat, self.readers)
        self.kept = {n for op in flat.ops if op.body for n in op.ins if n is not None}
        self.kept |= {n for n in flat.outputs if n is not None}

    def step(self, at: int, op: Op) -> None:
        self.lifetimes.at = at
        if op.body is not None:
            self._loop(op, op.body)
        elif op.name == "shardkit_constrain":
            self._constrain(op)
        elif op.name in ("dot_general", "conv_general_dilated"):
            self._product(op)
        elif op.name in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
            self._attention(op)
        else:
            self._other(op)

    def _other(self, op: Op) -> None:
        passes = op.name in KEEPS_PARTIAL or op.name == "add_any"
        shapes = [self._shape(n) for n in op.ins]
        ins = [self._laid(n, keep_sum=passes, beside=op) for n in op.ins]
        if op.name in ("gather", "scatter-add") and ins[0].stored:
            ins[0] = self._rows_of_stored(op, ins)
        for number in op.outs:
            laid = propagate(op, ins, shapes, self._shape(number))
            if op.name == "scatter-add" and number in self.wants:
                laid = shard_scatter(op, laid, self.wants[number])
            if laid.partial and op.name == "convert_element_type":
                self.unsummed[number] = self._width(op.ins[0])
            if op.name not in KEEPS_PARTIAL and op.name not in ("add_any", "gather", "scatter-add"):
                lost = laid.partial
                laid = dataclasses.replace(laid, partial=frozenset())
                self._send("all-reduce", lost - {MICRO}, self._bytes(number, laid))
            self.env[number] = laid
            self._made(op, number)

    def _rows_of_stored(self, op: Op, ins: Sequence[SymbolicSharding]) -> SymbolicSharding:
        table, used = ins[0], frozenset().union(*(one.axes for one in ins[1:]))
        clash = {axis for dim in table.dims for axis in dim if axis in used}
        return self._gathered(op.ins[0], table, clash)

    def _constrain(self, op: Op) -> None:
        (source,), (number,) = op.ins, op.outs
        assert source is not None
        laid, shape = self.env.get(source, replicated(0)), self._shape(number)
        target = self.walk.resolve(op.params["names"], shape)
        finer = op.params["finer"]
        skipped = finer is not None and not refines(self.walk.resolve(finer, shape), target)
        later = laid.partial and self._summed_later(number, laid, target)
        if skipped or later or (number in self.wants and not laid.partial):
            self.env[number] = laid
            self.lifetimes.follow(number, op.ins)
            return
        if MICRO in laid.axes:  # the axis of micro-batches is in no table
            first = next(i for i, dim in enumerate(laid.dims) if MICRO in dim)
            rows = tuple(dict.fromkeys((MICRO, *target[first])))
            target = (*target[:first], rows, *target[first + 1 :])
        self.env[number] = self._moved(number, laid, target)
        if self.env[number].dims == laid.dims and not laid.partial:
            self.lifetimes.follow(number, op.ins)
            return
        self.lifetimes.read(op)
        self._bear(number)

    def _summed_later(self, number: int, laid: SymbolicSharding, target: Dims) -> bool:
        """Whether the one reader splits finer: compilers make one scatter of sum and slice."""
        ops = self.readers.get(number, [])
        if len(ops) == 1 and ops[0].name == "convert_element_type":
            return laid.dims == target
        if len(ops) != 1 or ops[0].name != "shardkit_constrain":
            return False
        return splits_more(self.walk.resolve(ops[0].params["names"], self._shape(number)), target)

    def _moved(self, number: int, laid: SymbolicSharding, target: Dims) -> SymbolicSharding:
        stored, laid = laid.stored, self._summed(number, laid, target)
        goal = frozenset(axis for dim in target for axis in dim)
        lost = [(a, i) for i, dim in enumerate(laid.dims) for a in dim if a not in target[i]]
        gone = frozenset(a for a, _ in lost if a not in goal) - {MICRO}
        turned = frozenset(a for a, _ in lost if a in goal) - {MICRO}
        after = SymbolicSharding(tuple(tuple(a for a in dim if a not in gone) for dim in laid.dims))
        self._send("all-gather", gone, self._bytes(number, after), weight=stored)
        self._send("all-to-all", turned, self._bytes(number, after))
        return SymbolicSharding(drop_repeated_axes(target))

    def _product(self, op: Op) -> None:
        (out,) = op.outs
        left, right = (self._laid(n) for n in op.ins[:2])
        shapes = [self._shape(n) for n in op.ins[:2]]
        if op.name == "conv_general_dilated":
            left, right, dims, lost, flops = self._convolved(op, left, right)
        else:
            left, right = self._agreed(op, left, right)
            dims, lost, flops = contract(op, left, right, shapes[0])
        laid = SymbolicSharding(drop_repeated_axes(dims))
        self.env[out] = dataclasses.replace(laid, partial=frozenset(lost) - laid.axes - {MICRO})
        split = laid.axes | frozenset(lost)
        moved: SymbolicBytes = {}
        for number, one in ((op.ins[0], left), (op.ins[1], right), (out, laid)):
            add_bytes(moved, self._bytes(number, one))
        flops *= math.prod(self._shape(out))
        numbers = op.params["dimension_numbers"]
        tiles = matmul_dims(numbers, (left, right), shapes) if op.name == "dot_general" else ()
        self._work(op.name, flops, split, moved, tiles)
        self._made(op, out)

    def _attention(self, op: Op) -> None:
        """One device's queries on all keys: its results lie as its operands do."""
        laid, shapes = [self._laid(n) for n in op.ins], [self._shape(n) for n in op.ins[:2]]
        way, width = self.walk.way, self._width(op.ins[0])
        found = attention_costs(op.name, op.params["causal"], way, shapes, laid[:2], width)
        for kind, axes, payload in found.sent:
            self._send(kind, axes, payload)
        self._work(op.name, found.flops, laid[0].axes, found.moved)
        self.lifetimes.read(op)
        self.lifetimes.pass_through(found.held)
        made = (
            laid if op.name == ATTENTION_BACKWARD else (laid[0], SymbolicSharding(laid[0].dims[:3]))
        )  # and its lse
        for number, one in zip(op.outs, made, strict=False):
            self.env[number] = SymbolicSharding(one.dims)
            self._bear(number)

    def _convolved(
        self, op: Op, left: SymbolicSharding, right: SymbolicSharding
    ) -> tuple[SymbolicSharding, SymbolicSharding, list[Axes], list[str], float]:
        """Rows stay where they are; filters are gathered whole."""
        numbers = op.params["dimension_numbers"]
        right = self._gathered(op.ins[1], right, set(right.axes))
        dims: list[Axes] = [()] * len(self._shape(op.outs[0]))
        dims[numbers.out_spec[0]] = left.dims[numbers.lhs_spec[0]]
        filters = self._shape(op.ins[1])
        return left, right, dims, [], 2.0 * math.prod(filters) / filters[numbers.rhs_spec[0]]

    def _agreed(
        self, op: Op, left: SymbolicSharding, right: SymbolicSharding
    ) -> tuple[SymbolicSharding, SymbolicSharding]:
        """Gathers what one operand splits over an axis that the other has on another dim."""
        (lc, rc), (lb, rb) = op.params["dimension_numbers"]
        pairs = dict(zip((*lc, *lb), (*rc, *rb), strict=True))
        back = {r: n for n, r in pairs.items()}
        sizes = [math.prod(self._shape(n)) for n in op.ins[:2]]
        first = (left.stored and not right.stored) or (
            left.stored == right.stored and (sizes[0] < sizes[1])
        )
        if first:
            return self._gathered(op.ins[0], left, conflicting_axes(left, right, pairs)), right
        return left, self._gathered(op.ins[1], right, conflicting_axes(right, left, back))

    def _gathered(
        self, number: int | None, laid: SymbolicSharding, axes: set[str]
    ) -> SymbolicSharding:
        """Gathers an operand over axes, once per program for each value."""
        if not axes or number is None:
            return laid
        after = laid.with_dims(tuple(a for a in dim if a not in axes) for dim in laid.dims)
        key = ("gathered", number, frozenset(axes))
        held = self._bytes(number, after)
        if self.lifetimes.use(key, held):
            self._send("all-gather", frozenset(axes), held, weight=laid.stored)
        return after

    def _loop(self, op: Op, body: FlatProgram) -> None:
        ins = [self._laid(n) for n in op.ins]
        if op.name != "scan":
            self.lifetimes.read(op)
            for number in op.outs:
                self.env[number] = replicated(len(self._shape(number)))
                self._bear(number)
            inside = ins[-len(body.inputs) :]
            _, points = self.walk.run(body, inside, [None] * len(body.outputs), self.trips)
            self.lifetimes.repeat(points)
            return
        # By shape, as JAX's releases name the counts differently: what is stacked has a dim more.
        inner = body.inputs[len(body.inputs) - len(op.ins) :]
        pairs = list(zip(op.outs, body.outputs, strict=True))
        carried = sum(self._shape(out) == self._shape(one) for out, one in pairs)
        stacks = sum(self._shape(n) != self._shape(i) for n, i in zip(op.ins, inner, strict=True))
        consts = len(op.ins) - carried - stacks
        steps = frozenset(a for one in ins[consts + carried :] for a in one.dims[0])
        inside = ins[: consts + carried]
        inside += [one.with_dims(one.dims[1:]) for one in ins[consts + carried :]]
        wants: list[Dims | None] = [self.wants.get(n) for n in op.outs[:carried]]
        wants += [w[1:] if (w := self.wants.get(n)) else None for n in op.outs[carried:]]
        found, _ = Propagator(self.walk.resolve, self.walk.lanes, self.walk.way).run(
            body, inside, wants
        )
        for i in range(carried):
            inside[consts + i] = dataclasses.replace(found[i], partial=frozenset())
        trips, loops = self.trips * op.trips, self.loops | steps
        staged = PIPE in steps
        if staged:
            self._enter_layers(op.ins[consts : consts + carried], inside[consts:])
        outs, points = self.walk.run(body, inside, wants, trips, loops, carried)
        slices = [*inner[consts + carried :], *body.outputs[carried:]]
        copied = _copied(body, slices, [*inside[consts + carried :], *outs[carried:]])
        self.walk.work.append(
            Compute("stack", 0.0, frozenset(), copied, trips, loops, self.walk.part)
        )
        self.walk.part += staged
        self.lifetimes.read(op)
        along = tuple(sorted(steps))
        for i, number in enumerate(op.outs):
            self.env[number] = (
                outs[i]
                if i < carried
                else dataclasses.replace(outs[i], dims=(along, *outs[i].dims))
            )
            self._bear(number)
        self.lifetimes.repeat(points)

    def _enter_layers(
        self, carried: Sequence[int | None], laid: Sequence[SymbolicSharding]
    ) -> None:
        """Goes on to the next part; any further loop over layers is of the backward pass."""
        self.walk.part = min(self.walk.part + 1, PHASES.index("backward"))
        if PHASES[self.walk.part] == "forward":
            for number, one in zip(carried, laid, strict=False):
                add_bytes(self.walk.message, self._bytes(number, one))

    def _laid(
        self, number: int | None, keep_sum: bool = False, beside: Op | None = None
    ) -> SymbolicSharding:
        if number is None:
            return replicated(0)
        laid = self.env[number]
        if laid.partial and not keep_sum:
            target = self.wants.get(number) or (self._joined(number, beside) if beside else None)
            laid = self.env[number] = self._summed(number, laid, target)
        return laid

    def _joined(self, number: int, op: Op) -> Dims | None:
        """The layout that an elementwise operation has from all its operands."""
        form = self._shape(number)
        if (
            op.name in MATERIALIZED
            or op.name.startswith(REDUCTIONS)
            or self._shape(op.outs[0]) != form
        ):
            return None
        ins = [replicated(0) if n is None else self.env[n] for n in op.ins]
        return propagate(op, ins, [self._shape(n) for n in op.ins], form).dims

    def _summed(self, number: int, laid: SymbolicSharding, target: Dims | None) -> SymbolicSharding:
        """Makes a sum: scattered over the axes that the target splits, reduced over the rest."""
        if not laid.partial:
            return laid
        aim = target or laid.dims
        free = laid.partial - laid.axes
        dims = tuple(
            (*dim, *(a for a in goal if a in free and a not in dim))
            for dim, goal in zip(laid.dims, aim, strict=True)
        )
        after = SymbolicSharding(drop_repeated_axes(dims))
        scattered = after.axes - laid.axes
        gradient, width = self._is_gradient(number), self.unsummed.get(number)
        sent, left = self._bytes(number, laid, width), self._bytes(number, after, width)
        self._send("reduce-scatter", scattered, sent, gradient)
        self._send("all-reduce", laid.partial - scattered, left, gradient)
        if scattered:
            self.lifetimes.pass_through(self._bytes(number, laid))
        return after

    def _is_gradient(self, number: int) -> bool:
        """Whether it becomes a result of known layout, as it is or as one slice of a stack."""
        ops = [op for op in self.readers.get(number, ()) if op.name == "broadcast_in_dim"]
        return number in self.wants or any(op.outs[0] in self.wants for op in ops)

    def result(self, number: int | None) -> SymbolicSharding:
        return replicated(0) if number is None else self._laid(number)

    def _send(
        self,
        kind: str,
        axes: frozenset[str],
        payload: SymbolicBytes,
        gradient: bool = False,
        weight: bool = False,
    ) -> None:
        if axes:
            at = self.trips, self.loops, gradient, weight, self.walk.part
            self.walk.sent.append(Collective(kind, frozenset(axes), payload, *at))

    def _work(
        self,
        name: str,
        flops: float,
        split: frozenset[str],
        moved: SymbolicBytes,
        dims: MatmulDims = (),
    ) -> None:
        one = Compute(name, flops, split, moved, self.trips, self.loops, self.walk.part, dims)
        self.walk.work.append(one)

    def _made(self, op: Op, number: int) -> None:
        """Records a result: written to memory, or part of what reads it."""
        other = (
            find_accumulator(self.flat, self.readers, number) if op.name == "dot_general" else None
        )
        if other is not None and self.lifetimes.in_memory(other):
            self.lifetimes.read(op)
            self.lifetimes.follow(number, (other,))
            return
        material = op.name in MATERIALIZED or op.name.startswith(REDUCTIONS)
        constrained = [r.name for r in self.readers.get(number, [])] == ["shardkit_constrain"]
        if number in self.wants and self.env[number].partial and material and not constrained:
            self._laid(number)
        if not material and not (
            number in self.kept and op.name not in ("broadcast_in_dim", "iota")
        ):
            self.lifetimes.follow(number, op.ins)
            return
        self.lifetimes.read(op)
        moved = self.lifetimes.read_by(op)
        self._bear(number)
        if op.name != "dot_general":
            add_bytes(moved, self._bytes(number, self.env[number]))
            self._work(op.name, 0.0, frozenset(), moved)

    def _bear(self, number: int) -> None:
        laid = self.env[number]
        width = self._width(number) * padding_factor(self._shape(number), laid, self.walk.lanes)
        self.lifetimes.bear(number, self._bytes(number, laid, width))

    def _shape(self, number: int | None) -> tuple[int, ...]:
        return () if number is None else tuple(self.flat.avals[number].shape)

    def _bytes(
        self, number: int | None, laid: SymbolicSharding, width: float | None = None
    ) -> SymbolicBytes:
        if number is None:
            return {}
        return symbolic_bytes(self._shape(number), width or self._width(number), laid)

    def _width(self, number: int | None) -> float:
        """Bytes per element."""
        assert number is not None
        own = getattr(self.flat.avals[number].dtype, "itemsize", 4)
        return self.unsummed.get(number) or self.narrow.get(number) or own


def _copied(
    body: FlatProgram, slices: Sequence[int | None], laid: Sequence[SymbolicSharding]
) -> SymbolicBytes:
    """Bytes moved for slices of stacked arrays, each read and written once more."""
    moved: SymbolicBytes = {}
    for number, one in zip(slices, laid, strict=True):
        if number is not None and not one.stored:
            aval = body.avals[number]
            add_bytes(moved, symbolic_bytes(aval.shape, aval.dtype.itemsize, one), 2.0)
    return moved
