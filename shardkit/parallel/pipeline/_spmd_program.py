"""The SPMD program of a pipeline: manual over stages and rows, the rest is the partitioner's.

Inside, each device holds its own rows and its own gradients, so nothing is reduced before the one
sum after the last tick. What is sharded over the row axes, as fsdp shards weights, is gathered
once where the program begins.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ..._core.errors import Problem, StepError, raise_all
from ..._core.split_rng import RandomDraws, match_draws, part_keys
from ..._core.types import Mean
from ...nn._layer_stack import First, Last, Layer, split_layer_keys
from ...nn._overridable import StepContext
from ._executor import Device, totals
from ._schedule import Schedule
from ._stage_layout import Parts
from ._tick_program import ticks


@dataclasses.dataclass(frozen=True)
class Loss:
    """The arguments of `sk.nn.layer_stack` but the layers."""

    first: First
    layer: Layer
    last: Last
    ends: Any
    batch: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One `sk.nn.layer_stack` call on one mesh.

    Attributes:
      loss: what was called.
      around: the step.
      cut: which layers each stage works on.
      draws: which random draws grow with the rows, and how the rows are split.
      words: u32[layers + 1, 2], data of the keys of the layers and of `first`; None for none.
      message: what travels between stages, abstract.
      returned: what `last` returns, abstract.
      totals: the same with every scalar as a `Mean`.
    """

    loss: Loss
    around: StepContext
    cut: Parts
    draws: RandomDraws
    words: jax.Array | None
    message: Any
    returned: Any
    totals: Any

    @classmethod
    def of(
        cls, loss: Loss, layers: Any, around: StepContext, cut: Parts, micro_batches: int
    ) -> "Program":
        """Looks at the loss with the rows of one part.

        Raises:
          StepError: something other than floating-point arrays would travel, or the randomness of
            the loss cannot be split by rows.
        """
        lanes = math.prod(around.mesh.shape[axis] for axis in lane_axes(around))
        parts = lanes * micro_batches
        of_first, of_layers = split_layer_keys(loss.key, cut.layers)
        rows = _rows(loss.batch, parts)
        message = jax.eval_shape(loss.first, loss.ends, rows, of_first)
        _check_message(message)
        words = None
        grown = ()
        if loss.key is not None:
            words = jax.random.key_data(jnp.concatenate([of_layers, of_first[None]]))
            grown = _grown(loss, layers, parts, (of_first, of_layers[0]))
        return cls(
            loss=loss,
            around=around,
            cut=cut,
            draws=RandomDraws(lanes, grown, micro_batches),
            words=words,
            message=message,
            returned=jax.eval_shape(loss.last, loss.ends, message, rows),
            totals=jax.eval_shape(functools.partial(totals, loss.last), loss.ends, message, rows),
        )

    def evaluate(self, table: Schedule, *args: Any) -> Any:
        """Runs a table of forward passes on `(ends, layers, batch, words)`.

        Returns:
          What `last` does.
        """
        return self._returned(self._run(table, *args))

    def train(self, table: Schedule, *args: Any) -> tuple[Any, Any]:
        """Runs a whole table on the same; returns it with gradients of `(ends, layers)`."""
        summed, *grads = self._run(table, *args)
        return self._returned(summed), tuple(grads)

    def scale(self, cotangent: Any) -> jax.Array:
        """What the gradients of the summed loss are multiplied with, from that of the result."""
        loss = cotangent[0] if isinstance(cotangent, tuple) else cotangent
        parts = self.draws.gradient_shards * self.draws.micro_batches
        return loss.total if isinstance(loss, Mean) else loss / parts

    def _returned(self, summed: tuple[Mean, dict[str, Mean]]) -> Any:
        """Sums in the form that `last` has: a scalar is the mean over equal-sized parts."""

        def one(like: Any, mean: Mean) -> Any:
            return mean if isinstance(like, Mean) else mean.total / mean.weight

        if not isinstance(self.returned, tuple):
            return one(self.returned, summed[0])
        loss, metrics = self.returned
        return one(loss, summed[0]), {
            name: one(like, summed[1][name]) for name, like in metrics.items()
        }

    def _run(self, table: Schedule, ends: Any, layers: Any, batch: Any, words: Any) -> Any:
        """The sums over all parts; with gradients of ends and layers where the table trains."""
        axis, rows = self.cut.axis, lane_axes(self.around)
        every = PartitionSpec((axis, *rows))
        own = PartitionSpec(rows or None, axis) if self.cut.stored_apart else every
        stored = PartitionSpec(axis) if self.cut.stored_apart else PartitionSpec()
        placed = jax.tree.map(
            lambda x: PartitionSpec(rows or None) if x.ndim else PartitionSpec(), batch
        )
        apart = jax.shard_map(
            functools.partial(self._on_device, table),
            mesh=self.around.mesh,
            axis_names={axis, *rows},
            in_specs=(PartitionSpec(), stored, placed, PartitionSpec()),
            out_specs=(every, every, own) if table.trains else every,
            check_vma=False,  # the loss is anyone's: it need not say what varies
        )(ends, layers, batch, words)
        with jax.named_scope("reduce"):
            return jax.tree.map(_summed, apart)

    def _on_device(self, table: Schedule, ends: Any, layers: Any, batch: Any, words: Any) -> Any:
        """One device's share, with a dim in front that the sum is over."""
        rows, cut, m = lane_axes(self.around), self.cut, self.draws.micro_batches
        stage = jax.lax.axis_index(cut.axis)
        lane = jax.lax.axis_index(rows) if rows else jnp.zeros((), jnp.int32)
        numbers = jnp.asarray(cut.numbers)[stage]

        def keys(micro: jax.Array) -> tuple[Any, Any]:
            if words is None:
                return None, None
            made = [part_keys(w, self.draws, lane, micro) for w in (words[-1], words[numbers])]
            return made[0], made[1]

        device = Device(
            axis=cut.axis,
            first=self.loss.first,
            layer=self.loss.layer,
            last=self.loss.last,
            ends=ends,
            weights=cut.fetch(layers, stage),
            used=None if cut.even else numbers < cut.layers,
            filled=(np.size(cut.numbers) - cut.layers, cut.layers),
            rows=jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]) if x.ndim else x, batch),
            keys=keys,
            plan=ticks(table),
        )
        done = device.run(stage, self.message, self.totals, table.trains)
        if not table.trains:
            return _stacked(done.outcome)
        g_layers = cut.give_back(_as(done.weights, layers), stage)
        return _stacked((done.outcome, _as(done.ends, ends), g_layers))


def lane_axes(around: StepContext) -> tuple[str, ...]:
    """Axes whose devices keep gradients apart; rows that move stay the partitioner's."""
    return tuple(axis for axis in around.row_axes if axis not in around.moving_row_axes)


def _rows(batch: Any, parts: int) -> Any:
    """Abstract rows of one of so many parts."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] // parts, *x.shape[1:]) if x.ndim else (), x.dtype
        ),
        batch,
    )


def _grown(loss: Loss, layers: Any, parts: int, keys: tuple[Any, Any]) -> Any:
    """Compares what `first` and a layer draw for the rows of one part with that for all rows."""

    def draws(ends: Any, weights: Any, rows: Any, first_key: Any, layer_key: Any) -> Any:
        return loss.layer(weights, loss.first(ends, rows, first_key), rows, layer_key)

    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
    part, whole = (
        jax.eval_shape(lambda *args: args, loss.ends, weights, _rows(loss.batch, n), *keys)
        for n in (parts, 1)
    )
    return match_draws(draws, parts, part, whole).row_dims


def _check_message(message: Any) -> None:
    problems = [
        Problem(f"first(...) returned {x.dtype}{list(x.shape)}", "has no gradient to send back")
        for x in jax.tree.leaves(message)
        if not jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    fix = "read integers from `batch`, which every layer is given"
    raise_all(StepError, "What travels between stages must be floating-point.", problems, fix)


def _as(grads: Any, like: Any) -> Any:
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, like)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _summed(x: jax.Array) -> jax.Array:
    # `jnp.sum` would widen bf16 to f32, and with it what travels.
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,))
