"""Tokens sent to experts without padding, by `jax.lax.ragged_all_to_all`.

Received rows are at the front of a buffer with capacity for the most that could arrive; only rows
that were sent cross the links.

Dims: G groups, whose rows never meet; D devices that send or receive; X experts; R rows of one
device, S rows of a receiver's buffer, E width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from ...nn._expert_dispatch import (
    dispatch,
    dispatch_words,
    gather_from_slots,
    merge_mapped_dim,
    ragged_matmul,
    row_keys,
    sort_by_expert,
)
from ._dispatch import ExpertGroups, RunMlp

PLATFORMS = ("tpu", "gpu")
"""Platforms whose compilers support `ragged_all_to_all`; XLA's for CPUs refuses it."""

Runner = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedExchange:
    """How many rows each device sends to each other one, and their offsets on both."""

    sizes: jax.Array  # i32[G, D, D], rows from one device (dim 1) to another (dim 2)
    input_offsets: jax.Array  # i32[G, D, D], where they begin on the device that sends them
    output_offsets: jax.Array  # i32[G, D, D], where they begin on the device that receives them

    @classmethod
    def of(cls, counts_GDX: jax.Array) -> "RaggedExchange":
        """The exchange of rows that each device holds in order of their experts.

        A receiver holds the rows of the first device first. `counts_GDX` is i32[G, D, X], rows of
        each device for each expert; each device has X / D experts.

        >>> exchange = RaggedExchange.of(jnp.array([[[1, 0, 2, 0], [0, 3, 1, 1]]]))
        >>> exchange.sizes.tolist()
        [[[1, 2], [3, 2]]]
        >>> exchange.input_offsets.tolist(), exchange.output_offsets.tolist()
        ([[[0, 1], [0, 3]]], [[[0, 0], [1, 2]]])
        """
        groups, devices, number = counts_GDX.shape
        sizes = counts_GDX.reshape(groups, devices, devices, number // devices).sum(-1)
        return cls(sizes, jnp.cumsum(sizes, 2) - sizes, jnp.cumsum(sizes, 1) - sizes)

    @property
    def inverse(self) -> "RaggedExchange":
        """Sends the same rows back to where they came from."""
        arrays = self.sizes, self.output_offsets, self.input_offsets
        return RaggedExchange(*(x.swapaxes(1, 2) for x in arrays))


def received_experts(counts_GDX: jax.Array, capacity: int) -> jax.Array:
    """i32[G, D, capacity]: which of a device's own experts each received row is for.

    Rows of the buffer behind the received ones get X / D, past the last expert.
    """
    groups, devices, number = counts_GDX.shape
    own = number // devices
    # A receiver's rows come in runs, by sender, then by expert. With the counts of the example
    # above device 0 has runs of 1, 0, 0, 3 rows: ends 1 1 1 4; row 2 is in run 3, so of expert 1.
    runs = counts_GDX.reshape(groups, devices, devices, own).swapaxes(1, 2)
    ends = jnp.cumsum(runs.reshape(groups, devices, -1), -1)
    find = functools.partial(jnp.searchsorted, side="right", method="compare_all")
    run = jax.vmap(jax.vmap(find, (0, None)), (0, None))(ends, jnp.arange(capacity))
    return jnp.where(run < devices * own, run % own, own).astype(jnp.int32)


def run_dropless_ragged(
    groups: ExpertGroups,
    run_mlp: RunMlp,
    x_GDTE: jax.Array,
    expert_GDR: jax.Array,
    words: jax.Array | None,
    *,
    number: int,
) -> jax.Array:
    """[G, D, R, E]: each device sends its rows, sorted by expert, and nothing else."""
    rows = expert_GDR.shape[-1]
    own, capacity = number // groups.devices, groups.devices * rows
    order, place, counts = sort_by_expert(expert_GDR, number)
    counts = groups.gather(counts)
    plan = RaggedExchange.of(counts)
    sent: Any = (
        dispatch(x_GDTE, order, place, rows // x_GDTE.shape[2]),
        dispatch_words(words, order),
    )
    send = functools.partial(exchange, groups.run_manual, groups.axis, capacity)
    h, words = jax.tree.map(lambda x: checkpoint_name(send(x, plan), "experts_in"), sent)
    # Received rows are sorted by sender first; the products take them by expert.
    by_expert, by_sender, sizes = sort_by_expert(received_experts(counts, capacity), own)
    h: Any = dispatch(h, by_expert, by_sender, 1)
    keys = row_keys(dispatch_words(words, by_expert), h)
    y = run_mlp(h, lambda a, w: ragged_matmul(a, w, sizes, groups.run_per_device), keys)
    y = gather_from_slots(y, by_expert, by_sender)
    y = exchange(groups.run_manual, groups.axis, rows, y, plan.inverse)
    return gather_from_slots(checkpoint_name(y, "experts_out"), order, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange(
    run: Runner, axis: str, capacity: int, x_GDRE: jax.Array, plan: RaggedExchange
) -> jax.Array:
    """[G, D, capacity, E]: the received rows, in the order of their senders; zeros behind them.

    `run(function, *arrays)` computes it of arrays [G, D, ...] on the devices that hold them, where
    the function can use the collectives of `axis`; or locally. The plan says which rows go where.
    """

    # Gradient shards, which `vmap` maps over, become more groups.
    @custom_vmap
    def send(*args: jax.Array) -> jax.Array:
        return run(functools.partial(_exchange_groups, axis, capacity), *args)

    @send.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        out = send(*(merge_mapped_dim(x, m, size) for x, m in zip(args, mapped, strict=True)))
        return out.reshape(size, -1, *out.shape[1:]), True

    offsets = plan.input_offsets, plan.output_offsets
    return send(x_GDRE, plan.sizes, plan.inverse.sizes, *offsets)


def _exchange_fwd(
    run: Runner, axis: str, capacity: int, x_GDRE: jax.Array, plan: RaggedExchange
) -> tuple[jax.Array, tuple[RaggedExchange, int]]:
    return exchange(run, axis, capacity, x_GDRE, plan), (plan, x_GDRE.shape[2])


def _exchange_bwd(
    run: Runner, axis: str, capacity: int, residuals: tuple[RaggedExchange, int], g_GDSE: jax.Array
) -> tuple[Any, ...]:
    plan, rows = residuals
    return exchange(run, axis, rows, g_GDSE, plan.inverse), None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _exchange_groups(axis: str, capacity: int, x_GDRE: jax.Array, *plan: jax.Array) -> jax.Array:
    """The exchange of some groups, with one device's rows (D = 1) or those of all devices."""
    sizes, received_sizes, input_offsets, output_offsets = plan
    if x_GDRE.shape[1] == sizes.shape[-1]:
        local = functools.partial(_exchange_locally, capacity)
        return jax.vmap(local)(x_GDRE, sizes, input_offsets, output_offsets)

    def exchange_group(g: int) -> jax.Array:
        x_RE = x_GDRE[g, 0]
        empty = jnp.zeros((capacity, x_RE.shape[-1]), x_RE.dtype)
        return jax.lax.ragged_all_to_all(
            x_RE,
            empty,
            input_offsets[g, 0],
            sizes[g, 0],
            output_offsets[g, 0],
            received_sizes[g, 0],
            axis_name=axis,
        )

    return jnp.stack([exchange_group(g)[None] for g in range(x_GDRE.shape[0])])


def _exchange_locally(
    capacity: int, x_DRE: jax.Array, sizes: jax.Array, inputs: jax.Array, outputs: jax.Array
) -> jax.Array:
    """[D, capacity, E]: a gather where one device has all rows; sizes and offsets i32[D, D]."""
    rows = x_DRE.shape[1]

    def index_of(sizes_D: jax.Array, inputs_D: jax.Array, outputs_D: jax.Array) -> jax.Array:
        """Which of the D · R rows is at each place of one receiver's buffer; D · R for none."""
        place = jnp.arange(capacity)
        inside = (place >= outputs_D[:, None]) & (place < (outputs_D + sizes_D)[:, None])
        sender = jnp.argmax(inside, 0)
        row = sender * rows + inputs_D[sender] + place - outputs_D[sender]
        return jnp.where(inside.any(0), row, x_DRE.shape[0] * rows)

    index = jax.vmap(index_of, 1)(sizes, inputs, outputs)
    flat = x_DRE.reshape(-1, x_DRE.shape[-1])
    return jnp.take(flat, index, axis=0, mode="fill", fill_value=0)
