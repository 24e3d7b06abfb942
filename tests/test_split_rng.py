"""What a part of the rows draws is a slice of what `jax.random` draws for all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardkit._core.draws import match_draws
from shardkit._core.split_rng import RandomDraws, global_index, part_keys

from ._quick import some_quick

ROWS, WIDTH = 12, 5
KEY = jax.random.key(7)


def draw(x, key):
    """Every kind of draw, some that grow with the rows of x and some that do not."""
    one, two, three = jax.random.split(key, 3)
    noise = jax.random.normal(one, x.shape)
    kept = jax.random.bernoulli(jax.random.fold_in(two, 5), 0.5, (WIDTH, x.shape[0]))
    per_row = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(jax.random.split(three, x.shape[0]))
    coarse = jax.random.bits(three, x.shape, jnp.uint8)
    shared = jax.random.normal(two, (WIDTH,))
    return noise, kept.T, per_row, coarse, jnp.broadcast_to(shared, x.shape)


@pytest.mark.parametrize(
    ("shards", "micro_batches"), some_quick([(1, 3), (2, 3), (3, 1), (1, 1)], (2, 3), (3, 1))
)
def test_parts_draw_their_rows_of_the_whole(shards, micro_batches):
    x = jnp.zeros((ROWS, WIDTH))
    whole = jax.jit(draw)(x, KEY)
    rows, parts = ROWS // (shards * micro_batches), shards * micro_batches
    found = match_draws(draw, parts, (x[:rows], KEY), (x, KEY))
    draws = RandomDraws(shards, found.row_dims, micro_batches)

    @jax.jit
    def part(shard, micro):
        return draw(x[:rows], part_keys(jax.random.key_data(KEY), draws, shard, micro))

    for shard in range(shards):
        for micro in range(micro_batches):
            held = np.arange(ROWS)[micro::micro_batches][shard * rows : (shard + 1) * rows]
            for got, want in zip(part(shard, micro), whole, strict=True):
                np.testing.assert_array_equal(got, want[held])


def test_arrays_beyond_a_word_have_indices_of_two():
    draws = RandomDraws(2**20, (), 2**8)
    shape, shard, micro = (2, 3, 2**10), 2**20 - 3, 200
    part = dict(shard=jnp.uint32(shard), micro_batch=jnp.uint32(micro))
    high, low = global_index(draws, shape, row_dim=1, **part)
    at = (np.arange(3) + shard * 3) * 2**8 + micro
    full = 3 * 2**28
    want = (np.arange(2)[:, None] * full + at)[:, :, None] * 2**10 + np.arange(2**10)
    high, low = (np.asarray(word, np.int64) for word in (high, low))
    np.testing.assert_array_equal((high << 32) + low, want)
