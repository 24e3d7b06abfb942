"""The reference decoder as plain, hand-written JAX: what `cpu_decoder.py` compares with.

Dicts of arrays, a scan over stacked layers, `jax.nn.dot_product_attention`, whole logits through
`optax`. Nothing here is tuned, and nothing of shardkit is used but the sizes.
"""

import jax
import jax.numpy as jnp
import optax

from shardkit.lm import DecoderConfig

Weights = dict


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Rotary embedding of [batch, length, heads, head_dim]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def layer(x: jax.Array, w: Weights) -> tuple[jax.Array, None]:
    """One block."""
    h = norm(x, w["attn_norm"])
    q = rotate(jnp.einsum("bte,enh->btnh", h, w["query"]))
    k = rotate(jnp.einsum("bte,enh->btnh", h, w["key"]))
    v = jnp.einsum("bte,enh->btnh", h, w["value"])
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("btnh,nhe->bte", mixed, w["out"])
    h = norm(x, w["mlp_norm"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None


def losses(w: Weights, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross entropy of each token, f32[batch, length]."""
    x, _ = jax.lax.scan(layer, w["embedding"][batch["inputs"]], w["layers"])
    logits = norm(x, w["norm"]) @ w["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def loss(w: Weights, batch: dict[str, jax.Array]) -> jax.Array:
    """Weighted mean cross entropy."""
    return (losses(w, batch) * batch["weights"]).sum() / batch["weights"].sum()


def init(config: DecoderConfig, key: jax.Array) -> Weights:
    """Random weights in the layout that `Decoder` has too."""
    c, n = config, config.num_layers
    wide = (n, c.embed_dim, c.num_heads, c.head_size)
    shapes = {
        "query": wide,
        "key": wide,
        "value": wide,
        "out": (n, c.num_heads, c.head_size, c.embed_dim),
    }
    shapes |= {
        "gate": (n, c.embed_dim, c.mlp_dim),
        "up": (n, c.embed_dim, c.mlp_dim),
        "down": (n, c.mlp_dim, c.embed_dim),
    }
    keys = iter(jax.random.split(key, len(shapes) + 2))
    scale = c.embed_dim**-0.5
    layers = {name: scale * jax.random.normal(next(keys), s) for name, s in shapes.items()}
    layers |= {"attn_norm": jnp.ones((n, c.embed_dim)), "mlp_norm": jnp.ones((n, c.embed_dim))}
    return {
        "embedding": scale * jax.random.normal(next(keys), (c.vocab, c.embed_dim)),
        "layers": layers,
        "norm": jnp.ones((c.embed_dim,)),
        "head": scale * jax.random.normal(next(keys), (c.embed_dim, c.vocab)),
    }
