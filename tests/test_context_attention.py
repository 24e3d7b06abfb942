"""Attention over a split length against a softmax that is written out, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardkit.collectives import HeadExchange, Ring, across, attend, merge, zigzag_order
from shardkit.collectives import _blockwise
from shardkit.mesh import MeshSpec

B, H = 2, 8


def plain(q, k, v, ids, causal):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, 2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    seen = np.ones(s.shape[-2:], bool)
    seen = jnp.asarray(np.tril(seen) if causal else seen)
    if ids is not None:
        seen = seen & (ids[:, :, None] == ids[:, None, :])[:, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), v)


def inputs(heads, key_heads, length):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, length, n, H) for n in (heads, key_heads, key_heads, heads)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def segments(length):
    return jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (B, length)), 1))


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@functools.partial(jax.jit, static_argnums=0)
def both(attention, q, k, v, g):
    out, vjp = jax.vjp(attention, q, k, v)
    return out, *vjp(g)


def assert_is_plain(way, heads, key_heads, causal, packed, length=24):
    q, k, v, g = inputs(heads, key_heads, length)
    ids = segments(length) if packed else None
    got = both(lambda q, k, v: across(q, k, v, ids, causal, way), q, k, v, g)
    want = both(lambda q, k, v: plain(q, k, v, ids, causal), q, k, v, g)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert relative(x, y) < 1e-6, name


def way(kind, n, rows=(), heads=(), **sizes):
    count = n * int(np.prod(list(sizes.values())))
    mesh = MeshSpec(**sizes, context=n).build(devices=jax.devices()[:count])
    return kind(mesh, "context", rows, heads)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(("causal", "packed"), [(True, False), (True, True), (False, True)])
def test_a_ring_is_full_attention(n, causal, packed):
    assert_is_plain(way(Ring, n), 4, 2, causal, packed)


def test_a_ring_of_eight():
    assert_is_plain(way(Ring, 8), 2, 2, True, True, length=32)


@pytest.mark.parametrize(("causal", "packed"), [(True, True), (False, False)])
def test_all_to_all_is_full_attention(causal, packed):
    assert_is_plain(way(HeadExchange, 2), 4, 2, causal, packed)
    assert_is_plain(way(HeadExchange, 4), 8, 4, causal, packed)


@pytest.mark.parametrize("kind", [Ring, HeadExchange])
def test_rows_and_heads_may_be_split_as_well(kind):
    split = way(kind, 2, rows=("data",), heads=("tensor",), data=2, tensor=2)
    assert_is_plain(split, 8, 4, True, True)
