"""Propagates shardings through a flat program: what it computes, sends and holds, for every mesh.

It does what a partitioner does, by axis names alone: an operand that is sharded as a parameter is
gathered where it is used; a product over a split dim gives a partial sum, reduced where a
constraint or a parameter's own layout asks for it; any other disagreement is gathered.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from ._attention_costs import attention_costs
from ._costs import PHASES, PIPE, Compute, CostLog, ProgramSite, matmul_dims
from ._dataflow import Dims, propagate_backward, refines, splits_more
from ._program import FlatProgram, Op
from ._program_values import ProgramValues
from ._propagation import (
    KEEPS_PARTIAL,
    STAYS_PARTIAL,
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
    replicated,
    symbolic_bytes,
)

Resolve = Callable[[tuple[str | None, ...], tuple[int, ...]], Dims]
LiveBytes = list[SymbolicBytes]


@dataclasses.dataclass
class Propagator:
    """Propagates shardings through programs and logs what they cost."""

    resolve: Resolve  # logical names and shape → the mesh axes that split each dim
    tile_width: int = 1  # elements to which a device's memory fills one dim of a value; 1 for none
    attention: str = ""  # method of attention along a split length
    # collectives, products and writes found
    costs: CostLog = dataclasses.field(default_factory=CostLog)

    def run(
        self,
        flat: FlatProgram,
        ins: Sequence[SymbolicSharding],
        required: Sequence[Dims | None],
        *,
        trips: float = 1.0,
        loops: frozenset[str] = frozenset(),
        returned: int | None = None,
    ) -> tuple[list[SymbolicSharding], LiveBytes]:
        """Propagates through a program that is executed `trips` times per micro-batch.

        Results must have the `required` layouts. Axes in `loops` divide the trips. `returned`
        results, by default all, live to the end. Returns the sharding of each result, and the bytes
        alive at each operation.
        """
        values = ProgramValues(
            flat, self.costs, tile_width=self.tile_width, trips=trips, loops=loops
        )
        captured = flat.inputs[: len(flat.inputs) - len(ins)]  # constants of the trace
        values.shardings.update((n, replicated(len(flat.avals[n].shape))) for n in captured)
        values.shardings.update(zip(flat.inputs[len(captured) :], ins, strict=True))
        values.required = propagate_backward(flat, required)
        step = _OpPropagator(self, values, trips, loops)
        for at, op in enumerate(flat.ops):
            values.lifetimes.at = at
            step.propagate(op)
        outs = [values.sharding_of(number) for number in flat.outputs]
        return outs, values.lifetimes.live_bytes(len(outs) if returned is None else returned)


@dataclasses.dataclass(frozen=True)
class _OpPropagator:
    """Propagates through one operation after the other of a program."""

    propagator: Propagator
    values: ProgramValues
    trips: float
    loops: frozenset[str]

    def propagate(self, op: Op) -> None:
        if op.name == "scan" and op.body is not None:
            self._scan(op, op.body)
        elif op.body is not None:
            self._while(op, op.body)
        elif op.name == "shardkit_constrain":
            self._constrain(op)
        elif op.name in ("dot_general", "conv_general_dilated"):
            self._product(op)
        elif op.name in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
            self._attention(op)
        else:
            self._by_rule(op)

    def _by_rule(self, op: Op) -> None:
        """Any other operation: its rule gives the sharding of the result and its partial sums."""
        values = self.values
        keep_partial = op.name in KEEPS_PARTIAL or op.name == "add_any"
        shapes = [values.shape(n) for n in op.ins]
        ins = [values.sharding_of(n, keep_partial=keep_partial, reader=op) for n in op.ins]
        if op.name in ("gather", "scatter-add") and ins[0].is_param:
            # Rows of a table that is a parameter: it is gathered over the axes of the indices.
            used = frozenset().union(*(sharding.axes for sharding in ins[1:]))
            ins[0] = values.gather(op.ins[0], ins[0], used)
        for number in op.outs:
            sharding = propagate(op, ins, shapes, values.shape(number))
            if op.name == "scatter-add" and number in values.required:
                sharding = shard_scatter(op, sharding, values.required[number])
            if sharding.partial and op.name == "convert_element_type":
                # bf16 → f32 of a partial sum: the later reduction sends 2 bytes an element, not 4.
                values.cast_partial(number, op.ins[0])
            if op.name not in STAYS_PARTIAL:
                # The sum of f32[8, 64] over a dim that tensor splits: f32[8], all-reduced at once.
                summed = sharding.partial - {MICRO}
                sharding = dataclasses.replace(sharding, partial=frozenset())
                values.send("all-reduce", summed, values.bytes_of(number, sharding))
            values.shardings[number] = sharding
            values.record_output(op, number)

    def _constrain(self, op: Op) -> None:
        (source,), (number,) = op.ins, op.outs
        assert source is not None
        values, resolve = self.values, self.propagator.resolve
        sharding, shape = values.shardings.get(source, replicated(0)), values.shape(number)
        target = resolve(op.params["names"], shape)
        finer = op.params["finer"]
        skipped = finer is not None and not refines(resolve(finer, shape), target)
        deferred = sharding.partial and self._is_reduced_later(number, sharding, target)
        if skipped or deferred or (number in values.required and not sharding.partial):
            values.shardings[number] = sharding
            values.lifetimes.alias(number, op.ins)
            return
        if MICRO in sharding.axes:  # the axis of micro-batches is in no table
            first = next(i for i, dim in enumerate(sharding.dims) if MICRO in dim)
            rows = tuple(dict.fromkeys((MICRO, *target[first])))
            target = (*target[:first], rows, *target[first + 1 :])
        values.shardings[number] = values.reshard(number, sharding, target)
        if values.shardings[number].dims == sharding.dims and not sharding.partial:
            values.lifetimes.alias(number, op.ins)
            return
        values.lifetimes.read(op)
        values.allocate(number)

    def _is_reduced_later(self, number: int, sharding: SymbolicSharding, target: Dims) -> bool:
        """Whether a partial sum passes a constraint unreduced, as compilers combine what follows.

            y  partial {tensor}, dims ((data,), ())         a product over a dim that tensor splits
            y' = constrain(y, "batch", None)                target ((data,), ())
            z  = constrain(y', "batch", "residual")         ((data,), (tensor,)), the one reader

        An all-reduce for y' and a slice for z are one reduce-scatter for z, so y' stays partial.
        The one reader can also be a cast; then y' stays partial if it has the sharding of y.
        """
        ops = self.values.readers.get(number, [])
        if len(ops) != 1:
            return False
        if ops[0].name == "convert_element_type":
            return sharding.dims == target
        if ops[0].name != "shardkit_constrain":
            return False
        finer = self.propagator.resolve(ops[0].params["names"], self.values.shape(number))
        return splits_more(finer, target)

    def _product(self, op: Op) -> None:
        (out,), values = op.outs, self.values
        left, right = (values.sharding_of(n) for n in op.ins[:2])
        shapes = [values.shape(n) for n in op.ins[:2]]
        if op.name == "conv_general_dilated":
            right = values.gather(op.ins[1], right, right.axes)
            dims, summed, flops = self._convolve(op, left, shapes[1])
        else:
            left, right = self._align(op, left, right)
            dims, summed, flops = contract(op, left, right, shapes[0])
        sharding = SymbolicSharding(drop_repeated_axes(dims))
        partial = frozenset(summed) - sharding.axes - {MICRO}
        values.shardings[out] = dataclasses.replace(sharding, partial=partial)
        moved: SymbolicBytes = {}
        for number, operand in ((op.ins[0], left), (op.ins[1], right), (out, sharding)):
            add_bytes(moved, values.bytes_of(number, operand))
        flops *= math.prod(values.shape(out))
        is_dot = op.name == "dot_general"
        tiles = matmul_dims(op.params["dimension_numbers"], (left, right), shapes) if is_dot else ()
        split = sharding.axes | frozenset(summed)
        values.costs.compute.append(Compute(op.name, flops, split, moved, values.site, dims=tiles))
        values.record_output(op, out)

    def _convolve(
        self, op: Op, rows: SymbolicSharding, filters: tuple[int, ...]
    ) -> tuple[list[Axes], list[str], float]:
        """Dims of the result, no summed axes, FLOPs per element: rows stay where they are."""
        numbers = op.params["dimension_numbers"]
        dims: list[Axes] = [()] * len(self.values.shape(op.outs[0]))
        dims[numbers.out_spec[0]] = rows.dims[numbers.lhs_spec[0]]
        return dims, [], 2.0 * math.prod(filters) / filters[numbers.rhs_spec[0]]

    def _align(
        self, op: Op, left: SymbolicSharding, right: SymbolicSharding
    ) -> tuple[SymbolicSharding, SymbolicSharding]:
        """Gathers one operand over axes that the other has on another dim.

        The parameter is gathered; of two parameters, or of none, the smaller one.
        """
        (lc, rc), (lb, rb) = op.params["dimension_numbers"]
        pairs = dict(zip((*lc, *lb), (*rc, *rb), strict=True))
        sizes = [math.prod(self.values.shape(n)) for n in op.ins[:2]]
        left_is_smaller = left.is_param == right.is_param and sizes[0] < sizes[1]
        if left_is_smaller or (left.is_param and not right.is_param):
            axes = conflicting_axes(left, right, pairs)
            return self.values.gather(op.ins[0], left, axes), right
        axes = conflicting_axes(right, left, {r: n for n, r in pairs.items()})
        return left, self.values.gather(op.ins[1], right, axes)

    def _attention(self, op: Op) -> None:
        """One device's queries on all keys: the results are sharded as the operands are."""
        values = self.values
        shardings = [values.sharding_of(n) for n in op.ins]
        costs = attention_costs(
            op.name,
            causal=op.params["causal"],
            method=self.propagator.attention,
            shapes=[values.shape(n) for n in op.ins[:2]],
            shardings=shardings[:2],
            width=values.width(op.ins[0]),
        )
        for kind, axes, payload in costs.exchanges:
            values.send(kind, axes, payload)
        split, moved = shardings[0].axes, costs.bytes_moved
        values.costs.compute.append(Compute(op.name, costs.flops, split, moved, values.site))
        values.lifetimes.read(op)
        values.lifetimes.add_scratch(costs.scratch)
        outs = shardings  # gradients of q, k and v; forward the output and its f32[B, T, N] lse
        if op.name == ATTENTION_FORWARD:
            outs = [shardings[0], SymbolicSharding(shardings[0].dims[:3])]
        for number, sharding in zip(op.outs, outs, strict=False):
            values.shardings[number] = SymbolicSharding(sharding.dims)
            values.allocate(number)

    def _while(self, op: Op, body: FlatProgram) -> None:
        """A loop of unknown trips: its body counts once, its results are replicated."""
        values = self.values
        ins = [values.sharding_of(n) for n in op.ins]
        values.lifetimes.read(op)
        for number in op.outs:
            values.shardings[number] = replicated(len(values.shape(number)))
            values.allocate(number)
        inside = ins[-len(body.inputs) :]
        required = [None] * len(body.outputs)
        _, live = self.propagator.run(body, inside, required, trips=self.trips)
        values.lifetimes.nest_loop(live)

    def _scan(self, op: Op, body: FlatProgram) -> None:
        """A loop over a stacked dim, which is the dim of layers where a mesh axis splits it.

        scan operands  consts | carry | stacked f32[L, ...]   results  carry | stacks f32[L, ...]
        body inputs    consts | carry | slices  f32[...]      outputs  carry | slices f32[...]
        """
        values, propagator = self.values, self.propagator
        ins = [values.sharding_of(n) for n in op.ins]
        slices = body.inputs[len(body.inputs) - len(op.ins) :]
        consts, carried = self._count_scan(op, body, slices)
        first = consts + carried
        # 32 layers over pipe=4: the axis divides the trips, so a device runs 8 of them.
        layer_axes = frozenset(a for sharding in ins[first:] for a in sharding.dims[0])
        inside = [
            *ins[:first],
            *(sharding.with_dims(sharding.dims[1:]) for sharding in ins[first:]),
        ]
        required: list[Dims | None] = [values.required.get(n) for n in op.outs[:carried]]
        stacks = [values.required.get(n) for n in op.outs[carried:]]
        required += [dims[1:] if dims else None for dims in stacks]
        # A carry must leave the body as it enters. A first pass, whose costs are dropped, finds
        # how it leaves: x may enter replicated and leave split over tensor; from then on it is.
        dry_run = dataclasses.replace(propagator, costs=CostLog())
        leaving, _ = dry_run.run(body, inside, required)
        for i in range(carried):
            inside[consts + i] = dataclasses.replace(leaving[i], partial=frozenset())
        trips, loops = self.trips * op.trips, self.loops | layer_axes
        staged = PIPE in layer_axes
        if staged:
            self._enter_layers(op.ins[consts:first], inside[consts:])
        outs, live = propagator.run(
            body, inside, required, trips=trips, loops=loops, returned=carried
        )
        sliced = [*slices[first:], *body.outputs[carried:]]
        copied = _slice_bytes(body, sliced, [*inside[first:], *outs[carried:]])
        costs = propagator.costs
        site = ProgramSite(trips, loops, costs.phase)
        costs.compute.append(Compute("stack", 0.0, frozenset(), copied, site))
        costs.phase += staged
        values.lifetimes.read(op)
        along = tuple(sorted(layer_axes))
        for i, number in enumerate(op.outs):
            stacked = dataclasses.replace(outs[i], dims=(along, *outs[i].dims))
            values.shardings[number] = outs[i] if i < carried else stacked
            values.allocate(number)
        values.lifetimes.nest_loop(live)

    def _count_scan(
        self, op: Op, body: FlatProgram, slices: Sequence[int | None]
    ) -> tuple[int, int]:
        """Numbers of constants and carries of a scan.

        By shape, since JAX's releases name the counts differently: a stacked array has one dim
        more outside of the body than inside.
        """
        shape = self.values.shape
        outs = zip(op.outs, body.outputs, strict=True)
        carried = sum(shape(outer) == shape(inner) for outer, inner in outs)
        ins = zip(op.ins, slices, strict=True)
        stacked = sum(shape(outer) != shape(inner) for outer, inner in ins)
        return len(op.ins) - carried - stacked, carried

    def _enter_layers(
        self, carried: Sequence[int | None], shardings: Sequence[SymbolicSharding]
    ) -> None:
        """Advances to the next phase; any further loop over layers is of the backward pass."""
        costs = self.propagator.costs
        costs.phase = min(costs.phase + 1, PHASES.index("backward"))
        if PHASES[costs.phase] == "forward":
            for number, sharding in zip(carried, shardings, strict=False):
                add_bytes(costs.message, self.values.bytes_of(number, sharding))


def _slice_bytes(
    body: FlatProgram, slices: Sequence[int | None], shardings: Sequence[SymbolicSharding]
) -> SymbolicBytes:
    """Bytes moved for slices of stacked arrays, each read and written once more."""
    moved: SymbolicBytes = {}
    for number, sharding in zip(slices, shardings, strict=True):
        if number is not None and not sharding.is_param:
            aval = body.avals[number]
            add_bytes(moved, symbolic_bytes(aval.shape, aval.dtype.itemsize, sharding), 2.0)
    return moved
