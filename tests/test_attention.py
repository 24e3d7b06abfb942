"""Attention in blocks against the library's, and against a softmax that is written out."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardkit.nn import _attention
from shardkit.nn._attention import attention
from shardkit.nn._blockwise import query_blocks

from ._quick import some_quick


def plain(q, k, v, causal, segment_ids):
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat(group, 2), v.repeat(group, 2)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    seen = np.ones(logits.shape[-2:], bool)
    if causal:
        seen = np.tril(seen)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    p = np.exp(np.where(seen, logits, -np.inf) - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v)


def inputs(heads, key_heads, length=150, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, n, head_dim) for n in (heads, key_heads, key_heads, heads)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def segments(length=150):
    return jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, length)), 1))


def relative(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("heads", "key_heads", "causal", "cut"),
    some_quick([(4, 4, True, False), (4, 2, True, True), (6, 1, False, True)], (4, 2, True, True)),
)
def test_blocks_equal_the_library_forward_and_backward(heads, key_heads, causal, cut):
    q, k, v, g = inputs(heads, key_heads)
    ids = segments() if cut else None

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation):
        call = functools.partial(
            attention, causal=causal, segment_ids=ids, implementation=implementation
        )
        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(g)

    ours, library = both("blocked"), both("xla")
    wide = plain(*(np.asarray(x, np.float64) for x in (q, k, v)), causal, ids)
    assert relative(ours[0], jnp.asarray(wide, jnp.float32)) < 5e-7
    for got, want in zip(ours, library, strict=True):
        assert relative(got, want) < 1e-6


def test_auto_takes_cudnn_on_cuda_alone_and_for_what_it_serves(monkeypatch):
    asked = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *_, implementation, **__: asked.append(implementation),
    )

    def backend(version):
        monkeypatch.setattr(
            _attention, "get_backend", lambda: types.SimpleNamespace(platform_version=version)
        )

    half = inputs(2, 2, length=8, dtype=jnp.bfloat16)[:3]
    backend("cpu")
    assert attention(*half).dtype == jnp.bfloat16
    backend("PJRT C API cuda 13000")
    assert asked == []
    attention(*half)
    assert asked == ["cudnn"]
    attention(*inputs(2, 2, length=8)[:3])
    attention(*inputs(2, 2, length=8, head_dim=12, dtype=jnp.bfloat16)[:3])
    assert asked == ["cudnn"]


def test_the_backward_pass_keeps_no_square_of_the_length():
    q, k, v, _ = jax.eval_shape(lambda: inputs(2, 2, length=512))
    _, vjp = jax.eval_shape(functools.partial(jax.vjp, attention), q, k, v)
    assert max(x.size for x in jax.tree.leaves(vjp)) <= q.size


@pytest.mark.parametrize("queries", [1, 64, 65, 150, 512, 2048, 5000])
def test_blocks_cover_every_query_once(queries):
    bounds = query_blocks(queries)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(queries))
    assert len(bounds) <= 8


@pytest.mark.parametrize("segments", some_quick([False, True], True))
def test_the_tpu_kernel_agrees(segments):
    """The splash kernels, run step by step; their compile for a TPU is benchmarks/llama_v5p.py."""
    from shardkit.nn._splash import splash_attention

    draw = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(draw(size=(1, 256, heads, 128)), jnp.float32) for heads in (2, 1, 1))
    ids = jnp.asarray(np.repeat([0, 1], [100, 156])[None], jnp.int32) if segments else None

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda *a: (attend(*a) ** 2).mean(), (0, 1, 2)))(q, k, v)

    value, grads = run(lambda *a: splash_attention(*a, ids, True, interpret=True))
    wanted, wanted_grads = run(lambda *a: attention(*a, segment_ids=ids, implementation="blocked"))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, want in zip(grads, wanted_grads, strict=True):
        assert jnp.abs(got - want).max() <= 1e-4 * jnp.abs(want).max()
