"""Tokens sent to experts through slots: an all-to-all of equal parts.

Dims: G groups; B rows of the batch, T tokens of each, K choices of each token; D devices that send
or receive, R rows (choices of tokens) of one of them; E width.
"""

import jax
import jax.numpy as jnp

from ...nn._expert_dispatch import collect, dispatch, even, in_order, ragged, slots
from ._dispatch import ExpertGroups, RunMlp


def run_with_capacity(
    groups: ExpertGroups,
    run_mlp: RunMlp,
    x_GBTE: jax.Array,
    choice_GBTK: jax.Array,
    number: int,
    capacity: int,
) -> jax.Array:
    """[G, B, T · K, E]: every row of the batch sends the slots of all experts, full or not."""
    G, B, T, K = choice_GBTK.shape
    slot, row = slots(choice_GBTK.reshape(G, B, T * K), number, capacity)
    h = dispatch(x_GBTE, row, slot, K).reshape(G, B, number, capacity, -1)
    y = groups.from_experts(run_mlp(groups.to_experts(h), even))
    return collect(y.reshape(G, B, number * capacity, -1), row, slot)


def run_dropless_padded(
    groups: ExpertGroups,
    run_mlp: RunMlp,
    x_GDTE: jax.Array,
    expert_GDR: jax.Array,
    number: int,
) -> jax.Array:
    """[G, D, R, E]: every device sends R slots to every device, since all rows could go to one."""
    # 2 devices with 2 experts each, 3 rows; device 0 wants experts [1, 2, 0]:
    #   row in each slot       [0 2 .]  to device 0,  [1 . .]  to device 1
    #   its expert there       [1 0 2]                [0 2 2]    (2: an empty slot, past the last)
    # Device 1 then holds the slots of both senders, [0 2 2 | ...], and sorts them by expert, empty
    # ones last, which `ragged` leaves out; `order`, `place` and the slots undo it on the way back.
    G, D, R = expert_GDR.shape
    own, choices = number // D, R // x_GDTE.shape[2]
    slot, row = slots(expert_GDR // own, D, R)
    h = dispatch(x_GDTE, row, slot, choices).reshape(G, D, D, R, -1)
    expert = jnp.take_along_axis(expert_GDR % own, row, -1, mode="fill", fill_value=own)
    h, expert = groups.to_experts(h), groups.to_experts(expert.reshape(G, D, D, R))
    h, expert = h.swapaxes(1, 2), expert.swapaxes(1, 2)  # [G, receiver, sender, R, ...]
    order, place, sizes = in_order(expert.reshape(G, D, D * R), own)
    h = dispatch(h.reshape(G, D, D * R, -1), order, place, 1)
    y = collect(run_mlp(h, lambda a, w: ragged(a, w, sizes, groups.run_per_device)), order, place)
    y = groups.from_experts(y.reshape(G, D, D, R, -1).swapaxes(1, 2))
    return collect(y.reshape(G, D, D * R, -1), row, slot)
