"""What one device of a pipeline does: a scan over the ticks of a table.

In each tick the device computes what the table says (a part's forward pass, its backward pass, one
half of it, or nothing) and then sends one message to a neighbour. A backward pass recomputes the
part's forward pass from the part's input, the only activation that is kept; so memory holds the
slots of the table and the intermediates of one part, however many micro-batches there are. Each
stage executes its own branch only.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.precision import widen
from ..._core.scope_markers import annotate_branch_counts, recomputed
from ..._core.types import Mean, Params, PyTree
from ...nn._layer_stack import First, Last, Layer, StackKeys, scan_layers, stop_aux_gradients
from ._tick_program import Branch, Exchange, TickProgram

TickRow = dict[str, jax.Array]
"""One device's row of `TickProgram.columns`: i32[] by name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageState:
    """What a device carries from tick to tick."""

    slots: PyTree  # `[slots + 1, ...]` for each array of a message
    # gradients of its layers, [chunks, depth, ...], f32 at least; None for an array that is not
    # trained, and in an evaluation
    layer_grads: PyTree
    outer_grads: PyTree  # the same of the parameters outside the layers
    outputs: PyTree  # what `last` returned, summed, each scalar as a `Mean`


@dataclasses.dataclass(frozen=True)
class StageExecutor:
    """The functions and arrays of one device along the pipeline."""

    axis: str  # the mesh axis of the stages
    first: First  # the function before the layers
    layer: Layer  # one layer
    last: Last  # the function after them
    # for each array of `outer_params` and of `weights` whether it has a gradient
    trained: tuple[PyTree, PyTree]
    outer_params: Params  # parameters of `first` and `last`
    weights: Params  # `[chunks, depth, ...]`, parameters of this stage's layers
    is_layer: jax.Array | None  # bool[chunks, depth], false for padding; None where there is none
    layer_counts: tuple[int, int]  # places that are padding, and that are layers, on all stages
    rows: PyTree  # pytree of `[micro-batch rows, micro-batches, ...]`, and scalars
    keys: Callable[[jax.Array], StackKeys]  # of a micro-batch; those of layers [chunks, depth]
    program: TickProgram  # slots and exchanges of the schedule

    def run(self, stage: jax.Array, message: PyTree, outputs: PyTree, train: bool) -> StageState:
        """Executes all ticks of stage i32[], number of this device's.

        `message` has the `jax.ShapeDtypeStruct`s of what is sent between stages, `outputs` those of
        what `last_outputs` returns. Gradients are computed if `train`.
        """
        # A tick is one `switch` over what to compute and one over what to exchange. 1F1B with 2
        # stages and 2 micro-batches (the last stage's F0 and F1 are part of its B0 and B1):
        #
        #   tick                0     1     2     3     4     5
        #   stage 0 computes    F0    .     F1    B0    .     B1
        #   stage 1 computes    .     .     B0    .     B1    .
        #   and they exchange   0⇄1   .     0⇄1   .     0⇄1   .
        #
        # After tick 2 stage 0 sends the output of F1 and receives the gradient for B0, into the
        # slot `arrival0` of tick 2, which is the slot `grad` of tick 3. What it receives after
        # tick 0 goes into the slot behind the last, which is never read.
        program = self.program
        columns = {name: jnp.asarray(table)[:, stage] for name, table in program.columns.items()}
        branches = self._branches(message, train)
        exchanges = [functools.partial(self._exchange, exchange) for exchange in program.exchanges]
        branch_counts = np.bincount(program.columns["branch"].flat, minlength=len(branches))
        exchange_counts = np.bincount(program.exchange, minlength=len(exchanges))

        def tick(state: StageState, row: TickRow) -> tuple[StageState, None]:
            with annotate_branch_counts(branch_counts, divergent=True):
                sent, state = jax.lax.switch(row["branch"], branches, state, row)
            with annotate_branch_counts(exchange_counts):
                slots = jax.lax.switch(row["exchange"], exchanges, state.slots, sent, row)
            return dataclasses.replace(state, slots=slots), None

        start = StageState(
            slots=empty_slots(message, program.slots + 1),
            layer_grads=_zeros_f32(select(self.weights, self.trained[1])) if train else None,
            outer_grads=_zeros_f32(self._trained_outer) if train else None,
            outputs=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs),
        )
        rows = columns | {"exchange": jnp.asarray(program.exchange)}
        return jax.lax.scan(tick, start, rows)[0]

    def _branches(self, message: Any, train: bool) -> list[Callable[..., Any]]:
        """The function of each branch; branches that the table lacks compile to nothing."""
        functions = {
            Branch.FORWARD: functools.partial(self._forward, train),
            Branch.BACKWARD: self._backward,
            Branch.INPUT: self._input_half,
            Branch.WEIGHT: self._weight_half,
        }
        used = set(np.unique(self.program.columns["branch"]))

        def idle(state: StageState, row: TickRow) -> tuple[PyTree, StageState]:
            return zero_message(message), state

        return [_without_layout(functions.get(b, idle) if b in used else idle) for b in Branch]

    def _forward(self, train: bool, state: StageState, row: TickRow) -> tuple[PyTree, StageState]:
        keys = self.keys(row["micro"])
        x = self._cond(
            "first",
            Branch.FORWARD,
            row,
            lambda: self.first(self.outer_params, self._micro_batch(row), keys.first),
            lambda: _read_slot(state.slots, row["input"]),
        )
        y = self._part(row)(self._weights(row), x)
        if not train:
            outputs = self._cond(
                "last",
                Branch.FORWARD,
                row,
                lambda: _add(
                    state.outputs,
                    last_outputs(
                        self.last, self.outer_params, y, self._micro_batch(row), keys.last
                    ),
                ),
                lambda: state.outputs,
            )
            return y, dataclasses.replace(state, outputs=outputs)
        return y, dataclasses.replace(state, slots=_write_slot(state.slots, x, row["input"]))

    def _backward(self, state: StageState, row: TickRow) -> tuple[PyTree, StageState]:
        x = _read_slot(state.slots, row["input"])
        with self._recomputed(Branch.BACKWARD):
            y, pull = jax.vjp(self._part_of_trained(row), self._trained_weights(row), x)
        g, state = self._output_gradient(Branch.BACKWARD, state, row, y)
        g_weights, g_x = pull(g)
        state = self._add_layer_gradient(state, row, g_weights)
        return g_x, self._add_first_gradient(Branch.BACKWARD, state, row, g_x)

    def _input_half(self, state: StageState, row: TickRow) -> tuple[PyTree, StageState]:
        x = _read_slot(state.slots, row["input"])
        part, weights = self._part(row), self._weights(row)
        with self._recomputed(Branch.INPUT):
            y, pull = jax.vjp(lambda x: part(weights, x), x)
        g, state = self._output_gradient(Branch.INPUT, state, row, y)
        (g_x,) = pull(g)
        state = dataclasses.replace(state, slots=_write_slot(state.slots, g, row["grad"]))
        return g_x, self._add_first_gradient(Branch.INPUT, state, row, g_x)

    def _weight_half(self, state: StageState, row: TickRow) -> tuple[PyTree, StageState]:
        x, g = (_read_slot(state.slots, row[name]) for name in ("input", "grad"))
        part = self._part_of_trained(row)
        with recomputed():
            _, pull = jax.vjp(lambda weights: part(weights, x), self._trained_weights(row))
        return zero_message(x), self._add_layer_gradient(state, row, *pull(g))

    def _output_gradient(
        self, within: Branch, state: StageState, row: TickRow, y: Any
    ) -> tuple[PyTree, StageState]:
        """The gradient of a part's output: of the loss after the last part, else what arrived."""
        rows, key = self._micro_batch(row), self.keys(row["micro"]).last

        def of_loss() -> tuple[Any, Any, Any]:
            def total(trained: Any, y: Any) -> tuple[jax.Array, Any]:
                outer_params = _fill(trained, self.outer_params)
                outputs = last_outputs(self.last, outer_params, y, rows, key)
                return outputs[0].total, outputs

            (g_outer, g), outputs = jax.grad(total, (0, 1), has_aux=True)(self._trained_outer, y)
            return g, _add(state.outer_grads, g_outer), _add(state.outputs, outputs)

        g, outer_grads, outputs = self._cond(
            "last",
            within,
            row,
            of_loss,
            lambda: (_read_slot(state.slots, row["grad"]), state.outer_grads, state.outputs),
        )
        return g, dataclasses.replace(state, outer_grads=outer_grads, outputs=outputs)

    def _add_first_gradient(
        self, within: Branch, state: StageState, row: TickRow, g_x: Any
    ) -> StageState:
        """Adds the gradient of `first`, from that of the first part's input."""
        rows, key = self._micro_batch(row), self.keys(row["micro"]).first

        def first_gradient() -> Any:
            with recomputed():
                _, pull = jax.vjp(
                    lambda p: self.first(_fill(p, self.outer_params), rows, key),
                    self._trained_outer,
                )
            return _add(state.outer_grads, *pull(g_x))

        outer_grads = self._cond("first", within, row, first_gradient, lambda: state.outer_grads)
        return dataclasses.replace(state, outer_grads=outer_grads)

    def _recomputed(self, branch: Branch) -> contextlib.AbstractContextManager[None]:
        """Marks a backward tick's forward pass as recomputed; the last part has no other one."""
        ticks = self.program.columns["branch"]
        return recomputed(int((ticks == Branch.FORWARD).sum()), int((ticks == branch).sum()))

    def _cond(
        self, flag: str, within: Branch, row: TickRow, yes: Callable[[], Any], no: Callable[[], Any]
    ) -> Any:
        """`yes()` in the ticks of a branch that have a flag, `no()` in its others."""
        with annotate_branch_counts(self.program.flag_counts(flag, within)):
            return jax.lax.cond(row[flag] == 1, _without_layout(yes), _without_layout(no))

    def _add_layer_gradient(self, state: StageState, row: TickRow, grads: Any) -> StageState:
        def add(total: jax.Array, g: jax.Array) -> jax.Array:
            return total.at[row["chunk"]].add(g.astype(total.dtype))

        return dataclasses.replace(state, layer_grads=jax.tree.map(add, state.layer_grads, grads))

    def _part(self, row: TickRow) -> Callable[[Any, Any], Any]:
        """`(weights [depth, ...], x) → x`: the layers of one part on one micro-batch."""
        rows, keys = self._micro_batch(row), self.keys(row["micro"]).layers
        keys = None if keys is None else keys[row["chunk"]]
        if self.is_layer is None:
            return lambda weights, x: scan_layers(self.layer, x, weights, rows, keys)

        def layer(weights: Any, x: Any, rows: Any, key: Any) -> Any:
            weights, is_layer = weights
            compute = _without_layout(lambda: self.layer(weights, x, rows, key))
            with annotate_branch_counts(self.layer_counts):
                return jax.lax.cond(is_layer, compute, _without_layout(lambda: x))

        is_layer = self.is_layer[row["chunk"]]
        return lambda weights, x: scan_layers(layer, x, (weights, is_layer), rows, keys)

    def _part_of_trained(self, row: TickRow) -> Callable[[Any, Any], Any]:
        """The same of the trained weights alone."""
        part, weights = self._part(row), self._weights(row)
        return lambda trained, x: part(_fill(trained, weights), x)

    def _weights(self, row: TickRow) -> Any:
        return _read_slot(self.weights, row["chunk"])

    def _trained_weights(self, row: TickRow) -> Any:
        return select(self._weights(row), self.trained[1])

    @property
    def _trained_outer(self) -> Any:
        return select(self.outer_params, self.trained[0])

    def _micro_batch(self, row: TickRow) -> Any:
        def take(x: jax.Array) -> jax.Array:
            if x.ndim == 0:
                return x
            return jax.lax.dynamic_index_in_dim(x, row["micro"], 1, keepdims=False)

        return jax.tree.map(take, self.rows)

    def _exchange(self, exchange: Exchange, slots: Any, message: Any, row: TickRow) -> Any:
        for channel, pairs in enumerate(exchange):
            received = jax.tree.map(lambda x, by=pairs: jax.lax.ppermute(x, self.axis, by), message)
            slots = _write_slot(slots, received, row[f"arrival{channel}"])
        return slots


def select(params: PyTree, trained: PyTree) -> Any:
    """The arrays that are trained, None in place of the others."""
    return jax.tree.map(lambda x, has_gradient: x if has_gradient else None, params, trained)


def _fill(trained: PyTree, params: PyTree) -> Any:
    """All parameters again, after `select`."""
    return jax.tree.map(
        lambda x, own: own if x is None else x, trained, params, is_leaf=lambda x: x is None
    )


def last_outputs(
    last: Last, outer_params: Any, x: Any, rows: Any, key: Any
) -> tuple[Mean, dict[str, Mean]]:
    """What `last` returns, each scalar as a `Mean` of f32 or wider."""
    out = stop_aux_gradients(last(outer_params, x, rows, key))
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    return _as_mean(loss), {name: _as_mean(value) for name, value in metrics.items()}


def _without_layout(branch: Callable[..., Any]) -> Callable[..., Any]:
    """The branch without the layout of its results.

    XLA refuses a conditional in which one branch returns an array that the model constrains, such
    as a residual stream that is split over its length, and another branch one that it does not.
    """
    return lambda *args: jax.lax.optimization_barrier(branch(*args))


def zero_message(like: Any) -> Any:
    """What a stage sends when no stage needs its message; it is never read."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def empty_slots(like: Any, slots: int) -> Any:
    """Slots before they are written; none is read before."""
    return jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), like)


def _as_mean(value: Any) -> Mean:
    """A scalar is a mean over equal-sized parts, each of weight 1."""
    total, weight = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
    return Mean(widen(jnp.asarray(total)), widen(jnp.asarray(weight)))


def _zeros_f32(like: Any) -> Any:
    """Sums of gradients: f32 at least, whatever the compute dtype."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)


def _add(total: PyTree, grads: PyTree) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads)


def _read_slot(slots: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), slots)


def _write_slot(slots: Any, value: Any, number: jax.Array) -> Any:
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), number, 0),
        slots,
        value,
    )
