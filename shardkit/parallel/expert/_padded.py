"""Tokens sent to experts through slots: an all-to-all of equal parts.

Dims: G groups; B rows of the batch, T tokens of each, K choices of each token; D devices that send
or receive, R rows (choices of tokens) of one of them; E width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ...nn._expert_dispatch import (
    assign_slots,
    batched_matmul,
    dispatch,
    dispatch_words,
    gather_from_slots,
    ragged_matmul,
    row_keys,
    sort_by_expert,
)
from ._dispatch import ExpertGroups, RunMlp


def run_with_capacity(
    groups: ExpertGroups,
    run_mlp: RunMlp,
    x_GBTE: jax.Array,
    choice_GBTK: jax.Array,
    words: jax.Array | None,
    *,
    number: int,
    capacity: int,
) -> jax.Array:
    """[G, B, T · K, E]: every row of the batch sends the slots of all experts, full or not."""
    G, B, T, K = choice_GBTK.shape
    slot, row = assign_slots(choice_GBTK.reshape(G, B, T * K), number, capacity)
    slots: Any = dispatch(x_GBTE, row, slot, K), dispatch_words(words, row)
    slots = jax.tree.map(lambda x: x.reshape(G, B, number, capacity, -1), slots)
    h, words = jax.tree.map(groups.to_experts, slots)
    y = groups.from_experts(run_mlp(h, batched_matmul, row_keys(words, h)))
    return gather_from_slots(y.reshape(G, B, number * capacity, -1), row, slot)


def run_dropless_padded(
    groups: ExpertGroups,
    run_mlp: RunMlp,
    x_GDTE: jax.Array,
    expert_GDR: jax.Array,
    words: jax.Array | None,
    *,
    number: int,
) -> jax.Array:
    """[G, D, R, E]: every device sends R slots to every device, since all rows could go to one."""
    # 2 devices with 2 experts each, 3 rows; device 0 wants experts [1, 2, 0]:
    #   row in each slot       [0 2 .]  to device 0,  [1 . .]  to device 1
    #   its expert there       [1 0 2]                [0 2 2]    (2: an empty slot, past the last)
    # Device 1 then holds the slots of both senders, [0 2 2 | ...], and sorts them by expert, empty
    # ones last, which `ragged_matmul` leaves out. `order` and `place` undo the sort, `row` and
    # `slot` the slots.
    G, D, R = expert_GDR.shape
    own, choices = number // D, R // x_GDTE.shape[2]
    slot, row = assign_slots(expert_GDR // own, D, R)
    expert = jnp.take_along_axis(expert_GDR % own, row, -1, mode="fill", fill_value=own)
    slots: Any = dispatch(x_GDTE, row, slot, choices), expert[..., None], dispatch_words(words, row)

    def send(x: jax.Array) -> jax.Array:  # [G, receiver, slots of all senders, ...]
        sent = groups.to_experts(x.reshape(G, D, D, R, -1))
        return sent.swapaxes(1, 2).reshape(G, D, D * R, -1)

    h, expert, words = jax.tree.map(send, slots)
    order, place, sizes = sort_by_expert(expert[..., 0], own)
    h: Any = dispatch(h, order, place, 1)
    keys = row_keys(dispatch_words(words, order), h)
    y = run_mlp(h, lambda a, w: ragged_matmul(a, w, sizes, groups.run_per_device), keys)
    y = gather_from_slots(y, order, place)
    y = groups.from_experts(y.reshape(G, D, D, R, -1).swapaxes(1, 2))
    return gather_from_slots(y.reshape(G, D, D * R, -1), row, slot)
