"""The decoder against an independent, unrolled one, and what it promises about its shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardkit.models import Decoder, DecoderConfig, decoder_loss

CONFIG = DecoderConfig(vocab=48, embed=32, layers=3, heads=4, mlp=40, kv_heads=2)


def make_batch(config, rows=2, length=12, seed=0, segments=False):
    rng = np.random.default_rng(seed)
    batch = {
        "inputs": rng.integers(0, config.vocab, (rows, length)),
        "targets": rng.integers(0, config.vocab, (rows, length)),
        "weights": rng.integers(0, 2, (rows, length)).astype(np.float32),
    }
    if segments:
        batch["segment_ids"] = np.sort(rng.integers(0, 3, (rows, length)), 1)
    return jax.tree.map(jnp.asarray, batch)


def plain_norm(x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def plain_rotate(x):
    """Rotary embedding by complex numbers, the pairs (i, i + H/2) of each head."""
    half = x.shape[-1] // 2
    angle = np.outer(np.arange(x.shape[1]), 10_000.0 ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)[:, None]
    return jnp.concatenate([turned.real, turned.imag], -1)


def plain_loss(w, batch, config):
    """The whole model as loops over dicts, with whole logits and an explicit softmax."""
    length = batch["inputs"].shape[1]
    x = w["embedding"][batch["inputs"]]
    seen = np.tril(np.ones((length, length), bool))[None, None]
    if "segment_ids" in batch:
        ids = batch["segment_ids"]
        seen = seen & (ids[:, :, None] == ids[:, None, :])[:, None]
    for i in range(config.layers):
        n = {name: value[i] for name, value in w["layers"].items()}
        h = plain_norm(x, n["attn_norm"])
        q = plain_rotate(jnp.tensordot(h, n["query"], 1))
        k = plain_rotate(jnp.tensordot(h, n["key"], 1)).repeat(config.group, 2)
        v = jnp.tensordot(h, n["value"], 1).repeat(config.group, 2)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(config.head_size)
        p = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
        x = x + jnp.tensordot(jnp.einsum("bnts,bsnh->btnh", p, v), n["out"], 2)
        h = plain_norm(x, n["mlp_norm"])
        x = x + (jax.nn.silu(h @ n["gate"]) * (h @ n["up"])) @ n["down"]
    head = w["embedding"].T if config.tied else w["head"]
    log_p = jax.nn.log_softmax(plain_norm(x, w["norm"]) @ head)
    lse = jax.nn.logsumexp(plain_norm(x, w["norm"]) @ head, -1)
    nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    nll = nll + config.z_loss * lse**2
    return (nll * batch["weights"]).sum() / batch["weights"].sum()


def losses_and_grads(config, batch):
    graph, params = nnx.split(Decoder(config, nnx.Rngs(0)), nnx.Param)
    # Scales of norms start at one, where a missing scale would not show.
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)

    def loss(pure):
        mean, _ = decoder_loss(nnx.merge(graph, pure), batch)
        return mean.total / mean.weight

    ours = jax.jit(jax.value_and_grad(loss))(params)
    plain = jax.jit(jax.value_and_grad(plain_loss), static_argnums=2)
    plain = plain(nnx.to_pure_dict(params), batch, config)
    return (ours[0], nnx.to_pure_dict(ours[1])), plain


@pytest.mark.parametrize(
    ("changes", "segments"),
    [
        ({}, False),
        ({"tied": True, "loss_chunks": 4, "z_loss": 1e-2}, True),
        ({"kv_heads": None, "head_dim": 6, "loss_chunks": 3}, True),
        ({"kv_heads": 1, "z_loss": 1e-2, "attention": "xla"}, True),
    ],
)
def test_loss_and_every_gradient_equal_the_plain_decoder(changes, segments):
    config = DecoderConfig(**{**vars(CONFIG), **changes})
    batch = make_batch(config, segments=segments)
    (loss, grads), (plain, plain_grads) = losses_and_grads(config, batch)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    for path, want in jax.tree_util.tree_leaves_with_path(plain_grads):
        got = grads
        for key in path:
            got = got[key.key]
        error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        assert error < 4e-6, (jax.tree_util.keystr(path), error)
