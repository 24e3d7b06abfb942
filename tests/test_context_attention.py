"""Attention over a split length against a softmax that is written out, forward and backward."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.mesh import MeshSpec
from shardkit.nn._blockwise import BlockOptions
from shardkit.parallel.context import _blockwise
from shardkit.parallel.context._attention import UlyssesAttention, context_parallel_attention
from shardkit.parallel.context._attention_layout import Hidden
from shardkit.parallel.context._pairwise import PairwiseExchange, tournament
from shardkit.parallel.context._ring import RingAttention
from shardkit.parallel.context._zigzag import zigzag_order

from ._quick import some_quick

B, H = 2, 8
CAUSAL = BlockOptions(causal=True)


def plain(q, k, v, ids, causal, window=None, softcap=None):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, 2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    seen = np.ones(s.shape[-2:], bool)
    seen = np.tril(seen) if causal else seen
    seen = jnp.asarray(seen if window is None else seen & ~np.tril(seen, -window))
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
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@functools.partial(jax.jit, static_argnums=0)
def both(attention, q, k, v, g):
    out, vjp = jax.vjp(attention, q, k, v)
    return out, *vjp(g)


def assert_is_plain(layout, heads, key_heads, causal, packed, length=24, window=None, softcap=None):
    q, k, v, g = inputs(heads, key_heads, length)
    hidden = Hidden(segments(length) if packed else None)
    if window is not None:
        positions = jnp.broadcast_to(jnp.arange(length), (B, length))
        hidden = Hidden(hidden.ids, positions, positions - window + 1)
    options = BlockOptions(causal, softcap=softcap)
    split = functools.partial(context_parallel_attention, hidden=hidden, options=options)
    got = both(lambda *qkv: split(*qkv, layout=layout), q, k, v, g)
    limits = (hidden.ids, causal, window, softcap)
    want = both(lambda q, k, v: plain(q, k, v, *limits), q, k, v, g)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert relative(x, y) < 1e-6, name


def layout_on(kind, n, rows=(), heads=(), **sizes):
    count = n * int(np.prod(list(sizes.values())))
    mesh = MeshSpec(**sizes, context=n).build(devices=jax.devices()[:count])
    return kind(mesh, "context", rows, heads)


RINGS = {2: (True, True), 3: (False, True), 4: (True, False)}


@pytest.mark.parametrize("n", some_quick(RINGS, 3))
def test_a_ring_is_full_attention(n):
    assert_is_plain(layout_on(RingAttention, n), 4, 2, *RINGS[n])


LIMITED = {
    "ring, a window below a piece": (RingAttention, 4, dict(window=2)),
    "ring, over several pieces": (RingAttention, 3, dict(window=13, softcap=1.5)),
    "ring, soft cap, packed": (RingAttention, 2, dict(softcap=0.5, packed=True)),
    "in pairs": (PairwiseExchange, 4, dict(window=5, packed=True)),
    "all to all": (UlyssesAttention, 2, dict(window=7, softcap=1.5)),
}


@pytest.mark.parametrize("name", some_quick(LIMITED, "ring, over several pieces", "all to all"))
def test_windows_and_soft_caps(name):
    kind, n, limits = LIMITED[name]
    limits = {"packed": False, **limits}
    assert_is_plain(layout_on(kind, n), 4, 2, causal=True, **limits)


# A window that reaches few blocks: devices, window, blocks before a device's own, other options.
REACHED = {
    "all of one block": (4, 7, 1, {"packed": True}),
    "one key of a second": (4, 8, 2, {"softcap": 1.5}),
    "of three": (3, 4, 1, {}),
}


@pytest.mark.parametrize("name", some_quick(REACHED, "one key of a second"))
def test_blocks_that_a_window_does_not_reach_are_not_sent(name):
    n, window, reach, options = REACHED[name]
    layout = dataclasses.replace(layout_on(RingAttention, n), reach=reach)
    limits = {"packed": False, "window": window, **options}
    assert_is_plain(layout, 4, 2, causal=True, **limits)
    with pytest.raises(AssertionError):  # all of these blocks are needed
        assert_is_plain(dataclasses.replace(layout, reach=reach - 1), 4, 2, True, **limits)


@pytest.mark.parametrize(
    ("window", "blocks"),
    some_quick([(1, 0), (5, 1), (6, 2), (10, 3), (None, 3)], (6, 2)),
)
def test_the_ledger_has_the_blocks_of_the_window_and_so_has_the_minimum(window, blocks):
    """Rows of 16 tokens over four devices: a window of 10 reaches all other blocks."""
    width, heads = 8, 2

    def loss(params, batch, key):
        x = sk.nn.constrain(batch["x"] @ params["in"], "batch", "length", "embed")
        q, k, v = (
            sk.nn.constrain((x @ w).reshape(*x.shape[:2], heads, -1), "batch", "length", name, None)
            for w, name in zip(params["layers"][0], ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        y = sk.nn.attention(q, k, v, segment_ids=batch["ids"], window=window)
        return jnp.mean(jnp.tanh(y) ** 2)

    def init(key):
        layers = jax.random.normal(key, (1, 3, width, width)) / 2
        axes = ("layers", None, None, None)
        return {"in": jnp.eye(width), "layers": sk.WithAxes(layers, axes)}

    draw = np.random.default_rng(0)
    batch = {
        "x": draw.normal(size=(2, 16, width)).astype("f"),
        "ids": np.sort(draw.integers(0, 2, (2, 16)), 1).astype("i4"),
    }
    spec = sk.StepSpec(
        loss_fn=loss,
        init=init,
        batch=batch,
        optimizer=optax.sgd(0.1),
        strategy=sk.strategies.context(),
    )
    mesh = MeshSpec(context=4).build(devices=jax.devices()[:4])
    sk.verify(spec, [mesh], batches=[batch], steps=1).check()
    report = spec.compile(mesh).report()
    block = 4 * 2 * 4 * width  # f32, two rows of four tokens
    permutes = [row for row in report.ledger if row.kind == "collective-permute"]
    floats = [row for row in permutes if "f32" in row.operands[0]]
    sent = sum(row.payload_bytes * (row.trips or 0) for row in floats)
    # Two loops send K and V, and one their gradients; XLA merges the same permute of both passes.
    # In zig-zag order halves of q, k, v, of the output and of their gradients are swapped too.
    swapped = 5 * block if blocks == 3 else 0
    assert 2 * blocks * 2 * block <= sent <= 3 * blocks * 2 * block + swapped
    (least,) = (row for row in report.minima if row.axis == "context")
    weights = 4 * (width**2 + 3 * width**2)
    assert least.bytes == 3 * blocks * 2 * block + 2 * 3 / 4 * weights


def test_a_ring_of_eight_with_packed_rows():
    assert_is_plain(layout_on(RingAttention, 8), 4, 1, True, True, length=48)


@pytest.mark.parametrize(
    ("n", "causal", "packed"), some_quick([(2, False, False), (4, True, True)], (4, True, True))
)
def test_blocks_that_are_swapped_in_pairs_give_full_attention(n, causal, packed):
    assert_is_plain(layout_on(PairwiseExchange, n), 4, 2, causal, packed)


@pytest.mark.parametrize("n", [2, 4, 6, 8])
def test_everyone_meets_everyone_else_once(n):
    met = tournament(n)
    assert (np.sort(met, 0).T == [[j for j in range(n) if j != i] for i in range(n)]).all()
    assert all((row[row] == np.arange(n)).all() for row in met)


@pytest.mark.parametrize(("n", "causal", "packed"), [(2, True, True), (4, False, False)])
def test_all_to_all_is_full_attention(n, causal, packed):
    assert_is_plain(layout_on(UlyssesAttention, n), 8, 4, causal, packed)


def test_rows_and_heads_may_be_split_as_well():
    split = layout_on(RingAttention, 2, rows=("data",), heads=("tensor",), data=2, tensor=2)
    assert_is_plain(split, 4, 2, True, True)


@pytest.mark.parametrize("n", some_quick([2, 3, 8], 3))
def test_zigzag_moves_to_the_order_that_is_written_down(n):
    ring, x = layout_on(RingAttention, n), jnp.arange(B * 48).reshape(B, 48)
    moved = ring.to_compute_layout(x, CAUSAL)
    assert np.array_equal(moved, x[:, zigzag_order(48, n)])
    assert np.array_equal(ring.from_compute_layout(moved, CAUSAL), x)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_zigzag_gives_every_device_the_same_causal_work(n):
    held = zigzag_order(8 * n, n).reshape(n, -1)
    assert sorted(held.ravel()) == list(range(8 * n))
    assert len({int((own + 1).sum()) for own in held}) == 1
    assert (np.diff(held) > 0).all()


def test_many_tiles_are_one_and_hidden_ones_are_not_visited(monkeypatch):
    monkeypatch.setattr(_blockwise, "_WIDEST", 8)
    monkeypatch.setattr(_blockwise, "_NARROWEST", 2)
    assert len(_blockwise._Tiles(24, 24, True).pairs) == 6
    q, k, v, g = inputs(4, 2, 24)
    ids = segments(24)
    got = both(functools.partial(tiled, ids=ids), q, k, v, g)
    want = both(lambda q, k, v: plain(q, k, v, ids, True), q, k, v, g)
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) < 1e-6


def tiled(q, k, v, ids):
    """All-to-all attention on one device is the tiles alone."""
    layout = layout_on(UlyssesAttention, 1)
    return context_parallel_attention(q, k, v, Hidden(ids), CAUSAL, layout)


@pytest.mark.parametrize("kind", [RingAttention, UlyssesAttention])
@pytest.mark.parametrize("masked", some_quick(["no", "packed", "window"], "packed", "window"))
def test_a_scan_over_layers_keeps_no_tile_masks(kind, masked, monkeypatch):
    monkeypatch.setattr(_blockwise, "_WIDEST", 64)
    length, layout = 1024, layout_on(kind, 2)
    each = jnp.broadcast_to(jnp.arange(length), (1, length))
    hidden = {"packed": Hidden(each // 512), "window": Hidden(None, each, each - 100)}
    attend = functools.partial(
        context_parallel_attention, hidden=hidden.get(masked, Hidden()), options=CAUSAL
    )

    def loss(x):
        layer = jax.checkpoint(lambda x: attend(x, x, x, layout=layout) + x)
        return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    sizes = [
        np.prod([int(n) for n in dims.split("x")])
        for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)
    ]
    assert max(sizes) <= 2 * 2 * 64 * 64  # one tile, for two pieces of the length and two heads


@pytest.mark.parametrize(("length", "size"), [(24, 24), (512, 512), (1024, 512), (520, 260)])
def test_a_tile_is_the_largest_that_divides(length, size):
    assert _blockwise._tile_size(length) == size
    assert _blockwise._tile_size(521) == 521  # a prime above 512 has none
