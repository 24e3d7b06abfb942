"""The values of one program while it is propagated: shardings, buffers, and what they cost."""

from collections.abc import Container, Mapping

from ._buffer_lifetimes import BufferLifetimes
from ._costs import Collective, Compute, CostLog, ProgramSite
from ._dataflow import Dims, find_accumulator, find_narrowed, find_readers
from ._program import FlatProgram, Op
from ._propagation import is_materialized, propagate
from ._symbolic_sharding import (
    MICRO,
    SymbolicBytes,
    SymbolicSharding,
    add_bytes,
    drop_repeated_axes,
    padding_factor,
    replicated,
    symbolic_bytes,
)


class ProgramValues:
    """Shardings and buffers of a program's values; what a use of them sends goes to a log."""

    def __init__(
        self,
        flat: FlatProgram,
        costs: CostLog,
        *,
        tile_width: int,
        trips: float,
        loops: frozenset[str],
    ) -> None:
        self.flat, self.costs = flat, costs
        # By number of a value: the shardings computed so far, and layouts of the end.
        self.shardings: dict[int, SymbolicSharding] = {}
        self.required: Mapping[int, Dims] = {}
        self.lifetimes = BufferLifetimes(flat)
        self.readers = find_readers(flat)
        self._tile_width, self._trips, self._loops = tile_width, trips, loops
        self._narrowed = find_narrowed(flat, self.readers)
        # Bytes per element of values that are cast before their partial sum is reduced.
        self._partial_width: dict[int, float] = {}
        self._in_buffers = {n for op in flat.ops if op.body for n in op.ins if n is not None}
        self._in_buffers |= {n for n in flat.outputs if n is not None}

    def sharding_of(
        self, number: int | None, *, keep_partial: bool = False, reader: Op | None = None
    ) -> SymbolicSharding:
        """Sharding of an operand, None for a literal.

        A partial sum is reduced first, unless `keep_partial`. The layout of the operation that
        reads it decides where the sum is scattered.
        """
        if number is None:
            return replicated(0)
        sharding = self.shardings[number]
        if sharding.partial and not keep_partial:
            target = self.required.get(number)
            target = target or (self._layout_at(number, reader) if reader else None)
            sharding = self.shardings[number] = self.reduce_partial(number, sharding, target)
        return sharding

    def _layout_at(self, number: int, op: Op) -> Dims | None:
        """The layout that an elementwise operation gets from all its operands."""
        shape = self.shape(number)
        if is_materialized(op) or self.shape(op.outs[0]) != shape:
            return None
        ins = [replicated(0) if n is None else self.shardings[n] for n in op.ins]
        return propagate(op, ins, [self.shape(n) for n in op.ins], shape).dims

    def reduce_partial(
        self, number: int, sharding: SymbolicSharding, target: Dims | None
    ) -> SymbolicSharding:
        """Reduces a partial sum: scattered over axes that the target splits, else all-reduced.

        partial {data, fsdp}, dims ((), (tensor,)), target ((fsdp,), (tensor,))
        → reduce-scatter over fsdp to ((fsdp,), (tensor,)), then all-reduce over data
        """
        if not sharding.partial:
            return sharding
        free = sharding.partial - sharding.axes
        dims = tuple(
            (*dim, *(a for a in goal if a in free and a not in dim))
            for dim, goal in zip(sharding.dims, target or sharding.dims, strict=True)
        )
        after = SymbolicSharding(drop_repeated_axes(dims))
        scattered = after.axes - sharding.axes
        is_gradient, width = self._is_gradient(number), self._partial_width.get(number)
        before_bytes = self.bytes_of(number, sharding, width)
        after_bytes = self.bytes_of(number, after, width)
        self.send("reduce-scatter", scattered, before_bytes, is_gradient=is_gradient)
        rest = sharding.partial - scattered
        self.send("all-reduce", rest, after_bytes, is_gradient=is_gradient)
        if scattered:
            self.lifetimes.add_scratch(self.bytes_of(number, sharding))
        return after

    def _is_gradient(self, number: int) -> bool:
        """Whether it becomes a result of required layout, as it is or as one slice of a stack."""
        ops = [op for op in self.readers.get(number, ()) if op.name == "broadcast_in_dim"]
        return number in self.required or any(op.outs[0] in self.required for op in ops)

    def cast_partial(self, number: int, source: int | None) -> None:
        """Remembers that a partial sum is cast before it is reduced, at the width of its source."""
        self._partial_width[number] = self.width(source)

    def reshard(self, number: int, sharding: SymbolicSharding, target: Dims) -> SymbolicSharding:
        """Moves a value to a constraint's layout: axes that go are gathered, others exchanged."""
        is_param, sharding = sharding.is_param, self.reduce_partial(number, sharding, target)
        goal = frozenset(axis for dim in target for axis in dim)
        moved = frozenset(
            a for d, t in zip(sharding.dims, target, strict=False) for a in d if a not in t
        )
        gathered, exchanged = moved - goal - {MICRO}, (moved & goal) - {MICRO}
        size = self.bytes_of(number, sharding.without(gathered))
        self.send("all-gather", gathered, size, is_param=is_param)
        self.send("all-to-all", exchanged, size)
        return SymbolicSharding(drop_repeated_axes(target))

    def gather(
        self, number: int | None, sharding: SymbolicSharding, axes: Container[str]
    ) -> SymbolicSharding:
        """Gathers an operand over axes, once per program for each value."""
        over = frozenset(a for a in sharding.axes if a in axes)
        if not over or number is None:
            return sharding
        after = sharding.without(over)
        size = self.bytes_of(number, after)
        if self.lifetimes.read_temporary(("gathered", number, over), size):
            self.send("all-gather", over, size, is_param=sharding.is_param)
        return after

    @property
    def site(self) -> ProgramSite:
        """Where the program's operations run now."""
        return ProgramSite(self._trips, self._loops, self.costs.phase)

    def send(self, kind: str, axes: frozenset[str], payload: SymbolicBytes, **reason: bool) -> None:
        """Logs a collective, if there are axes; `reason` is `is_gradient` or `is_param`."""
        if axes:
            self.costs.collectives.append(Collective(kind, axes, payload, self.site, **reason))

    def record_output(self, op: Op, number: int) -> None:
        """Records a result: written to memory, or fused into what reads it."""
        other = (
            find_accumulator(self.flat, self.readers, number) if op.name == "dot_general" else None
        )
        if other is not None and self.lifetimes.is_written(other):
            self.lifetimes.read(op)
            self.lifetimes.alias(number, (other,))
            return
        materialized = is_materialized(op)
        constrained = [r.name for r in self.readers.get(number, [])] == ["shardkit_constrain"]
        if number in self.required and materialized and not constrained:
            self.sharding_of(number)
        recomputed = op.name in ("broadcast_in_dim", "iota")
        if not materialized and (recomputed or number not in self._in_buffers):
            self.lifetimes.alias(number, op.ins)
            return
        self.lifetimes.read(op)
        moved = self.lifetimes.bytes_read_by(op)
        self.allocate(number)
        if op.name != "dot_general":
            add_bytes(moved, self.bytes_of(number, self.shardings[number]))
            self.costs.compute.append(Compute(op.name, 0.0, frozenset(), moved, self.site))

    def allocate(self, number: int) -> None:
        """Gives a value a buffer, its tiles filled."""
        sharding = self.shardings[number]
        padding = padding_factor(self.shape(number), sharding, self._tile_width)
        self.lifetimes.allocate(
            number, self.bytes_of(number, sharding, self.width(number) * padding)
        )

    def shape(self, number: int | None) -> tuple[int, ...]:
        """Shape of a value; of a literal none."""
        return () if number is None else tuple(self.flat.avals[number].shape)

    def bytes_of(
        self, number: int | None, sharding: SymbolicSharding, width: float | None = None
    ) -> SymbolicBytes:
        """Bytes of a value under a sharding; of a literal none."""
        if number is None:
            return {}
        return symbolic_bytes(self.shape(number), width or self.width(number), sharding)

    def width(self, number: int | None) -> float:
        """Bytes per element."""
        assert number is not None
        own = getattr(self.flat.avals[number].dtype, "itemsize", 4)
        return self._partial_width.get(number) or self._narrowed.get(number) or own
