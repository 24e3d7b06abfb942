"""What one device of a pipeline does: a scan over the ticks of a table.

In each tick the device computes what the table says (a part's forward pass, its backward pass, one
half of it, or nothing) and then sends one message to a neighbour. A backward pass computes the
part's forward pass again from the part's input, which is all that is kept of it; so what lives
is the slots of the table and the intermediates of one part, whatever the micro-batches. Each
stage takes its own branch and pays for no other's work.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.scope_markers import annotate_branch_counts, recomputed
from ..._core.types import Mean
from ...nn._layer_stack import First, Last, Layer, scan_layers, stop_aux_gradients
from ._tick_program import Branch, Exchange, Ticks

Row = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """What a device carries from tick to tick.

    Attributes:
      slots: `[slots + 1, ...]` for each array that travels.
      weights: gradients of its layers, [chunks, depth, ...], f32 at least; None in an evaluation.
      ends: gradients of the ends; None in an evaluation.
      outcome: what `last` returned, summed, each scalar as a `Mean`.
    """

    slots: Any
    weights: Any
    ends: Any
    outcome: Any


@dataclasses.dataclass(frozen=True)
class Device:
    """The functions and arrays of one device along the pipeline.

    Attributes:
      axis: the mesh axis of the stages.
      first: the part before the layers.
      layer: one layer.
      last: the part after them.
      ends: parameters of `first` and `last`.
      weights: `[chunks, depth, ...]`, of this stage's layers.
      used: bool[chunks, depth], which of them are layers; None where all are.
      filled: how many are none, and are, on all stages.
      rows: pytree of `[micro-batch rows, micro-batches, ...]`, and scalars.
      keys: `(micro-batch) → (key of first, keys of the layers [chunks, depth])`; or Nones.
      plan: the table as slots and exchanges.
    """

    axis: str
    first: First
    layer: Layer
    last: Last
    ends: Any
    weights: Any
    used: jax.Array | None
    filled: tuple[int, int]
    rows: Any
    keys: Callable[[jax.Array], tuple[Any, Any]]
    plan: Ticks

    def run(self, stage: jax.Array, message: Any, outcome: Any, train: bool) -> Running:
        """Works off the table.

        Args:
          stage: i32[], number of this device's stage.
          message: `jax.ShapeDtypeStruct`s of what travels.
          outcome: the same for what `totals` returns.
          train: whether gradients are wanted.
        """
        plan = self.plan
        columns = {name: jnp.asarray(table)[:, stage] for name, table in plan.columns.items()}
        branches = self._branches(message)
        exchanges = [functools.partial(self._exchange, exchange) for exchange in plan.exchanges]

        def tick(now: Running, row: Row) -> tuple[Running, None]:
            often = np.bincount(plan.columns["branch"].flat, minlength=len(branches))
            with annotate_branch_counts(often, divergent=True):
                out, now = jax.lax.switch(row["branch"], branches, now, row)
            with annotate_branch_counts(np.bincount(plan.exchange, minlength=len(exchanges))):
                slots = jax.lax.switch(row["exchange"], exchanges, now.slots, out, row)
            return dataclasses.replace(now, slots=slots), None

        start = Running(
            blank(message, plan.slots + 1),
            _zeros(self.weights) if train else None,
            _zeros(self.ends) if train else None,
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outcome),
        )
        rows = columns | {"exchange": jnp.asarray(plan.exchange)}
        done, _ = jax.lax.scan(tick, start, rows)
        return done

    def _branches(self, message: Any) -> list[Callable[..., Any]]:
        """The branches that the table has, and for the others nothing that would be compiled."""
        made = {
            Branch.FORWARD: self._forward,
            Branch.BACKWARD: self._backward,
            Branch.INPUT: self._input_half,
            Branch.WEIGHT: self._weight_half,
        }
        there = set(np.unique(self.plan.columns["branch"]))

        def idle(now: Running, row: Row) -> tuple[Any, Running]:
            return silence(message), now

        return [_open(made.get(b, idle) if b in there else idle) for b in Branch]

    def _forward(self, now: Running, row: Row) -> tuple[Any, Running]:
        first_key, _ = self.keys(row["micro"])
        x = self._if(
            "first",
            Branch.FORWARD,
            row,
            lambda: self.first(self.ends, self._micro_batch(row), first_key),
            lambda: _read(now.slots, row["input"]),
        )
        y = self._part(row)(self._own(row), x)
        if now.ends is None:
            outcome = self._if(
                "last",
                Branch.FORWARD,
                row,
                lambda: _added(
                    now.outcome, totals(self.last, self.ends, y, self._micro_batch(row))
                ),
                lambda: now.outcome,
            )
            return y, dataclasses.replace(now, outcome=outcome)
        return y, dataclasses.replace(now, slots=_written(now.slots, x, row["input"]))

    def _backward(self, now: Running, row: Row) -> tuple[Any, Running]:
        x = _read(now.slots, row["input"])
        with self._again(Branch.BACKWARD):
            y, pull = jax.vjp(self._part(row), self._own(row), x)
        g, now = self._arrived(Branch.BACKWARD, now, row, y)
        g_weights, g_x = pull(g)
        now = self._with_weights(now, row, g_weights)
        return g_x, self._begun(Branch.BACKWARD, now, row, g_x)

    def _input_half(self, now: Running, row: Row) -> tuple[Any, Running]:
        x = _read(now.slots, row["input"])
        part, own = self._part(row), self._own(row)
        with self._again(Branch.INPUT):
            y, pull = jax.vjp(lambda x: part(own, x), x)
        g, now = self._arrived(Branch.INPUT, now, row, y)
        (g_x,) = pull(g)
        now = dataclasses.replace(now, slots=_written(now.slots, g, row["grad"]))
        return g_x, self._begun(Branch.INPUT, now, row, g_x)

    def _weight_half(self, now: Running, row: Row) -> tuple[Any, Running]:
        x, g = (_read(now.slots, row[name]) for name in ("input", "grad"))
        part = self._part(row)
        with recomputed():
            _, pull = jax.vjp(lambda own: part(own, x), self._own(row))
        return silence(x), self._with_weights(now, row, *pull(g))

    def _arrived(self, within: Branch, now: Running, row: Row, y: Any) -> tuple[Any, Running]:
        """The gradient of a part's output: of the loss after the last part, else what came."""
        rows = self._micro_batch(row)

        def of_loss() -> tuple[Any, Any, Any]:
            def total(ends: Any, y: Any) -> tuple[jax.Array, Any]:
                outcome = totals(self.last, ends, y, rows)
                return outcome[0].total, outcome

            (g_ends, g), outcome = jax.grad(total, (0, 1), has_aux=True)(self.ends, y)
            return g, _added(now.ends, g_ends), _added(now.outcome, outcome)

        g, ends, outcome = self._if(
            "last",
            within,
            row,
            of_loss,
            lambda: (_read(now.slots, row["grad"]), now.ends, now.outcome),
        )
        return g, dataclasses.replace(now, ends=ends, outcome=outcome)

    def _begun(self, within: Branch, now: Running, row: Row, g_x: Any) -> Running:
        """Takes the gradient of the first part's input on to the parameters of `first`."""
        rows, (key, _) = self._micro_batch(row), self.keys(row["micro"])

        def to_ends() -> Any:
            with recomputed():
                _, pull = jax.vjp(lambda ends: self.first(ends, rows, key), self.ends)
            return _added(now.ends, *pull(g_x))

        ends = self._if("first", within, row, to_ends, lambda: now.ends)
        return dataclasses.replace(now, ends=ends)

    def _again(self, branch: Branch) -> contextlib.AbstractContextManager[None]:
        """Marks a part's forward pass in a backward tick: the last part has had no other."""
        ticks = self.plan.columns["branch"]
        return recomputed(int((ticks == Branch.FORWARD).sum()), int((ticks == branch).sum()))

    def _if(
        self, flag: str, within: Branch, row: Row, yes: Callable[[], Any], no: Callable[[], Any]
    ) -> Any:
        """`yes()` in the ticks of a branch that have a flag, `no()` in the others."""
        with annotate_branch_counts(self.plan.often(flag, within)):
            return jax.lax.cond(row[flag] == 1, _open(yes), _open(no))

    def _with_weights(self, now: Running, row: Row, grads: Any) -> Running:
        def add(total: jax.Array, g: jax.Array) -> jax.Array:
            return total.at[row["chunk"]].add(g.astype(total.dtype))

        return dataclasses.replace(now, weights=jax.tree.map(add, now.weights, grads))

    def _part(self, row: Row) -> Callable[[Any, Any], Any]:
        """`(weights [depth, ...], x) → x`: the layers of one part on one micro-batch."""
        rows, (_, keys) = self._micro_batch(row), self.keys(row["micro"])
        keys = None if keys is None else keys[row["chunk"]]
        if self.used is None:
            return lambda weights, x: scan_layers(self.layer, x, weights, rows, keys)

        def layer(weights: Any, x: Any, rows: Any, key: Any) -> Any:
            weights, used = weights
            with annotate_branch_counts(self.filled):
                mine = _open(lambda: self.layer(weights, x, rows, key))
                return jax.lax.cond(used, mine, _open(lambda: x))

        used = self.used[row["chunk"]]
        return lambda weights, x: scan_layers(layer, x, (weights, used), rows, keys)

    def _own(self, row: Row) -> Any:
        return _read(self.weights, row["chunk"])

    def _micro_batch(self, row: Row) -> Any:
        def take(x: jax.Array) -> jax.Array:
            if x.ndim == 0:
                return x
            return jax.lax.dynamic_index_in_dim(x, row["micro"], 1, keepdims=False)

        return jax.tree.map(take, self.rows)

    def _exchange(self, exchange: Exchange, slots: Any, message: Any, row: Row) -> Any:
        for channel, pairs in enumerate(exchange):
            came = jax.tree.map(lambda x, by=pairs: jax.lax.ppermute(x, self.axis, by), message)
            slots = _written(slots, came, row[f"arrival{channel}"])
        return slots


def totals(last: Last, ends: Any, x: Any, rows: Any) -> tuple[Mean, dict[str, Mean]]:
    """What `last` returns, each scalar as a `Mean` of f32."""
    out = stop_aux_gradients(last(ends, x, rows))
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    return _as_mean(loss), {name: _as_mean(one) for name, one in metrics.items()}


def _open(branch: Callable[..., Any]) -> Callable[..., Any]:
    """The branch with nothing said of its results' layout.

    XLA refuses a conditional of which one branch returns what a model constrains, as a residual
    stream that is split over its length, and another one what it does not.
    """
    return lambda *args: jax.lax.optimization_barrier(branch(*args))


def silence(like: Any) -> Any:
    """What a stage sends when it has nothing to say; it is never read."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def blank(like: Any, slots: int) -> Any:
    """Slots before anything was written; none is read before."""
    return jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), like)


def _as_mean(value: Any) -> Mean:
    """A scalar is a mean over equal-sized parts, each of weight 1."""
    total, weight = (value.total, value.weight) if isinstance(value, Mean) else (value, 1.0)
    return Mean(jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32))


def _zeros(like: Any) -> Any:
    """Gradients are summed in f32 at least, whatever the compute dtype."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)


def _added(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _read(slots: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), slots)


def _written(slots: Any, value: Any, number: jax.Array) -> Any:
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), number, 0),
        slots,
        value,
    )
