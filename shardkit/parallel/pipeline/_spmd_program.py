"""The SPMD program of a pipeline: manual over stages and rows, automatic over other axes.

Inside, each device has its own rows and its own gradients, so nothing is reduced before the one sum
after the last tick. Parameters that are sharded over the row axes, as by fsdp, are gathered once
where the program begins.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from ..._core.draws import match_draws
from ..._core.errors import Problem, StepError, raise_all
from ..._core.split_rng import RandomDraws, part_keys
from ..._core.tracing import uses_dtype
from ..._core.types import Batch, Key, Mean, Params, PyTree
from ...nn._layer_stack import First, Last, Layer, StackKeys, split_layer_keys
from ...nn._overridable import StepContext
from ._closures import closure_problems
from ._executor import StageExecutor, last_outputs, select
from ._schedule import PipelineSchedule
from ._stage_layout import StageLayout
from ._tick_program import tick_program


@dataclasses.dataclass(frozen=True)
class LayerStackCall:
    """The arguments of `sk.nn.layer_stack` except the layers."""

    first: First
    layer: Layer
    last: Last
    outer_params: Params
    batch: Batch
    key: Key | None

    def closure_problems(self, layers: Params) -> Iterator[Problem]:
        """Every parameter that one of the functions does not take as an argument."""
        key, outer, batch = self.key, self.outer_params, self.batch
        x = jax.eval_shape(self.first, outer, batch, key)
        weights = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layers)
        yield from closure_problems("first", self.first, (outer, batch, key))
        yield from closure_problems("layer", self.layer, (weights, x, batch, key))
        yield from closure_problems("last", self.last, (outer, x, batch, key))


@dataclasses.dataclass(frozen=True)
class PipelineProgram:
    """One `sk.nn.layer_stack` call on one mesh."""

    call: LayerStackCall  # its arguments
    around: StepContext  # the step
    stage_layout: StageLayout  # which layers each stage works on
    draws: RandomDraws  # which random draws grow with the rows, and how the rows are split
    # u32[layers + 2, 2], data of the keys of the layers, of `first` and of `last`; None for no key
    words: jax.Array | None
    message: PyTree  # what is sent between stages, abstract
    returned: Any  # what `last` returns, abstract
    outputs: PyTree  # the same with every scalar as a `Mean`

    @classmethod
    def of(
        cls,
        call: LayerStackCall,
        layers: Params,
        around: StepContext,
        layout: StageLayout,
        micro_batches: int,
    ) -> "PipelineProgram":
        """Traces the functions with the rows of one micro-batch of one device.

        Raises StepError if stages would send something else than floating-point arrays, compute in
        float16, or the random draws of the loss cannot be split by rows.
        """
        devices = math.prod(around.mesh.shape[axis] for axis in manual_row_axes(around))
        parts = devices * micro_batches
        keys = split_layer_keys(call.key, layout.layers)
        rows = _abstract_rows(call.batch, parts)
        message = jax.eval_shape(call.first, call.outer_params, rows, keys.first)
        _check_message(message)
        _check_range(call, layers, message, rows, keys)
        words = None
        grown = ()
        if call.key is not None:
            ends = jnp.stack([keys.first, keys.last])
            words = jax.random.key_data(jnp.concatenate([keys.layers, ends]))
            grown = _find_grown_draws(call, layers, parts, keys)
        last = call.outer_params, message, rows, keys.last
        return cls(
            call=call,
            around=around,
            stage_layout=layout,
            draws=RandomDraws(devices, grown, micro_batches),
            words=words,
            message=message,
            returned=jax.eval_shape(call.last, *last),
            outputs=jax.eval_shape(functools.partial(last_outputs, call.last), *last),
        )

    def evaluate(self, table: PipelineSchedule, *args: Any) -> Any:
        """Runs a table of forward passes on `(outer_params, layers, batch, words)`.

        Returns:
          What `last` does.
        """
        return self._format(self._run(table, (None, None), *args))

    def train(self, table: PipelineSchedule, trained: Any, *args: Any) -> tuple[Any, Any]:
        """Runs a training table on the same; returns gradients of both parameters as well.

        `trained` says for each array of `(outer_params, layers)` whether it has a gradient; of
        others it is None.
        """
        sums, *grads = self._run(table, trained, *args)
        return self._format(sums), tuple(grads)

    def scale(self, cotangent: Any) -> jax.Array:
        """The factor of the gradients of the summed loss, from the cotangent of the result."""
        loss = cotangent[0] if isinstance(cotangent, tuple) else cotangent
        total = loss.total if isinstance(loss, Mean) else loss
        if isinstance(total, SymbolicZero):
            return jnp.zeros(())
        parts = self.draws.gradient_shards * self.draws.micro_batches
        return total if isinstance(loss, Mean) else total / parts

    def _format(self, sums: tuple[Mean, dict[str, Mean]]) -> Any:
        """Sums in the form that `last` returns: a scalar is the mean over equal-sized parts."""

        def format_one(like: Any, mean: Mean) -> Any:
            return mean if isinstance(like, Mean) else mean.total / mean.weight

        if not isinstance(self.returned, tuple):
            return format_one(self.returned, sums[0])
        loss, metrics = self.returned
        formatted = {name: format_one(like, sums[1][name]) for name, like in metrics.items()}
        return format_one(loss, sums[0]), formatted

    def _run(
        self,
        table: PipelineSchedule,
        trained: tuple[PyTree, PyTree],
        outer_params: Params,
        layers: Params,
        batch: Batch,
        words: Any,
    ) -> Any:
        """The sums over all parts; with gradients if the table trains."""
        axis, rows = self.stage_layout.axis, manual_row_axes(self.around)
        unsplit, by_rows = PartitionSpec(), PartitionSpec(rows or None)
        # Each device's result gets a leading dim, over which it is then summed. Gradients of layers
        # that each stage stores for itself are summed over the row axes alone.
        every_device = PartitionSpec((axis, *rows))
        stored, layer_grads = unsplit, every_device
        if self.stage_layout.is_stored_split:
            stored, layer_grads = PartitionSpec(axis), PartitionSpec(rows or None, axis)
        run = jax.shard_map(
            functools.partial(self._run_on_device, table, trained),
            mesh=self.around.mesh,
            axis_names={axis, *rows},
            in_specs=(
                unsplit,
                stored,
                jax.tree.map(lambda x: by_rows if x.ndim else unsplit, batch),
                unsplit,
            ),
            out_specs=(every_device, every_device, layer_grads) if table.trains else every_device,
            check_vma=False,  # the user's loss does not say what varies over the axes
        )
        results = run(outer_params, layers, batch, words)
        with jax.named_scope("reduce"):
            return jax.tree.map(_sum, results)

    def _run_on_device(
        self,
        table: PipelineSchedule,
        trained: tuple[PyTree, PyTree],
        outer_params: Params,
        layers: Params,
        batch: Batch,
        words: Any,
    ) -> Any:
        """One device's share, with the leading dim that the sum is over."""
        layout, m = self.stage_layout, self.draws.micro_batches
        rows = manual_row_axes(self.around)
        stage = jax.lax.axis_index(layout.axis)
        shard = jax.lax.axis_index(rows) if rows else jnp.zeros((), jnp.int32)
        numbers = jnp.asarray(layout.numbers)[stage]

        def keys(micro: jax.Array) -> StackKeys:
            if words is None:
                return StackKeys()
            own = words[-2], words[numbers], words[-1]
            return StackKeys(*(part_keys(w, self.draws, shard, micro) for w in own))

        executor = StageExecutor(
            axis=layout.axis,
            first=self.call.first,
            layer=self.call.layer,
            last=self.call.last,
            trained=trained,
            outer_params=outer_params,
            weights=layout.gather_stage_layers(layers, stage),
            is_layer=None if layout.is_even else numbers < layout.layers,
            layer_counts=(np.size(layout.numbers) - layout.layers, layout.layers),
            rows=jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]) if x.ndim else x, batch),
            keys=keys,
            program=tick_program(table),
        )
        state = executor.run(stage, self.message, self.outputs, table.trains)
        if not table.trains:
            return _add_leading_dim(state.outputs)
        g_outer, g_layers = jax.tree.map(
            lambda g, x: g.astype(x.dtype),
            (state.outer_grads, state.layer_grads),
            select((outer_params, layers), trained),
        )
        return _add_leading_dim(
            (state.outputs, g_outer, layout.scatter_stage_grads(g_layers, stage))
        )


def manual_row_axes(around: StepContext) -> tuple[str, ...]:
    """Axes of rows that are manual here; the partitioner splits those along which rows move."""
    return tuple(axis for axis in around.row_axes if axis not in around.moving_row_axes)


def _abstract_rows(batch: Any, parts: int) -> Any:
    """Abstract rows of one of several equal parts of the batch."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] // parts, *x.shape[1:]) if x.ndim else (), x.dtype
        ),
        batch,
    )


def _find_grown_draws(call: LayerStackCall, layers: Any, parts: int, keys: StackKeys) -> Any:
    """Finds the random draws of the three parts whose shapes grow with the number of rows."""

    def draws(outer_params: Any, weights: Any, rows: Any, *keys: Any) -> Any:
        first_key, layer_key, last_key = keys
        x = call.layer(weights, call.first(outer_params, rows, first_key), rows, layer_key)
        return call.last(outer_params, x, rows, last_key)

    one_layer = keys._replace(layers=keys.layers[0])
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
    part, whole = (
        jax.eval_shape(
            lambda *args: args,
            call.outer_params,
            weights,
            _abstract_rows(call.batch, n),
            *one_layer,
        )
        for n in (parts, 1)
    )
    return match_draws(draws, parts, part, whole, keys=len(keys)).row_dims


def _check_message(message: Any) -> None:
    problems = [
        Problem(f"first(...) returned {x.dtype}{list(x.shape)}", "has no gradient to send back")
        for x in jax.tree.leaves(message)
        if not jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    fix = "read integers from `batch`, which every layer gets"
    raise_all(StepError, "Stages can only send floating-point arrays.", problems, fix)


def _check_range(
    call: LayerStackCall, layers: Any, message: Any, rows: Any, keys: StackKeys
) -> None:
    """Refuses float16: a stage sums gradients over rows whose weight it does not know."""

    def run(outer_params: Any, layers: Any, x: Any, rows: Any, keys: StackKeys) -> Any:
        call.first(outer_params, rows, keys.first)
        weights, key = jax.tree.map(lambda w: w[0], (layers, keys.layers))
        return call.last(outer_params, call.layer(weights, x, rows, key), rows, keys.last)

    jaxpr = jax.make_jaxpr(run)(call.outer_params, layers, message, rows, keys).jaxpr
    if uses_dtype(jaxpr, jnp.float16):
        why = "computes in float16, which sums of gradients over the rows of a stage may overflow"
        fix = 'bfloat16: precision="bfloat16", or x.astype(jnp.bfloat16) in the model'
        raise_all(StepError, "The pipeline would lose gradients.", [Problem("loss_fn", why, fix)])


def _add_leading_dim(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _sum(x: jax.Array) -> jax.Array:
    # `jnp.sum` would widen bf16 to f32, and so double the bytes that are sent.
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,))
