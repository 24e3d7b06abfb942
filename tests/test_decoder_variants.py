"""What model families differ in: windows, soft caps, padded tables, and all of it on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardkit as sk
from shardkit.lm import DecoderConfig, decoder_model
from shardkit.lm._block import layer_norm

from . import _hf
from ._quick import some_quick
from ._tables import table
from .test_decoder import make_batch

SMALL = {
    "vocab": 30,
    "vocab_padding": 2,
    "embed_dim": 16,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 6,
    "mlp_dim": 24,
    "tie_embeddings": True,
}
GEMMA = DecoderConfig(
    **SMALL,
    kv_heads=2,
    window=5,
    global_layers=(1, 3),
    local_rope_theta=100.0,
    rope_factor=2.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    attn_softcap=3.0,
    logit_softcap=4.0,
    query_scale=0.3,
    embed_scale=4.0,
    activation="gelu_tanh",
    bias=("query", "key", "value"),
    loss_chunks=2,
)
GPT = DecoderConfig(**SMALL, norm="layer", positions=16, gated=False, activation="gelu", bias=True)


def plain_attention(q, k, v, window, softcap, ids):
    """Attention by one softmax over all keys, heads repeated."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    distance = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])
    seen = (distance >= 0) & (distance < (window or q.shape[1]))
    seen = seen[None] & (ids[:, :, None] == ids[:, None])
    p = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


@pytest.mark.parametrize(
    ("options", "softcap"),
    [
        ({"window": 40}, 2.0),
        ({"window": jnp.asarray(70)}, None),
        ({"window": 1, "implementation": "xla"}, None),
    ],
)
def test_windows_and_soft_caps_equal_one_softmax(options, softcap):
    """150 tokens are three blocks, with windows inside of one and across two."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, (2, 150, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 150, 2, 8)) for key in keys[2:])
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 150)), 1))

    def ours(q, k, v):
        return sk.nn.attention(q, k, v, segment_ids=ids, softcap=softcap, **options)

    def plain(q, k, v):
        return plain_attention(q, k, v, int(options["window"]), softcap, ids)

    def run(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    for got, want in zip(jax.jit(run, static_argnums=0)(ours), run(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_an_integer_window_saves_products():
    x = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)

    def flops(window):
        lowered = jax.jit(lambda x: sk.nn.attention(x, x, x, window=window)).lower(x)
        return lowered.cost_analysis()["flops"]

    assert flops(64) < 0.5 * flops(None)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"softcap": 2.0, "implementation": "xla"}, "softcap=  is not in implementation='xla'"),
        ({"window": 8, "implementation": "splash"}, "window=  is not in implementation='splash'"),
        ({"window": 8, "causal": False}, "causal=False shows those after it too"),
        ({"window": 0}, "window=0  must be positive"),
        ({"softcap": "2"}, "expected float or none"),
    ],
)
def test_options_that_an_attention_lacks_are_refused(options, part):
    x = jnp.ones((1, 8, 2, 8))
    with pytest.raises(sk.errors.StepError, match=r"sk\.nn\.attention") as error:
        sk.nn.attention(x, x, x, **options)
    assert part in str(error.value)


SPLIT_LENGTHS = {
    "ring": (sk.strategies.context(), {"context": 4}),
    "all to all": (sk.strategies.context(attention="all_to_all"), {"context": 2}),
    "beside data": (sk.strategies.data() | sk.strategies.context(), {"data": 2, "context": 2}),
}


@pytest.mark.parametrize("name", some_quick(SPLIT_LENGTHS, slow=["ring"]))
def test_a_split_length_has_windows_and_soft_caps(name):
    strategy, mesh = SPLIT_LENGTHS[name]
    batch = make_batch(GEMMA, rows=2, length=16)
    spec = _hf.make_spec(GEMMA, rows=2).replace(batch=batch)
    found = [
        jax.device_get(step.gradients(step.init(jax.random.key(0)), batch))
        for step in (
            spec.replace(strategy=sk.strategies.data()).compile(_hf.make_mesh({"data": 1})),
            spec.replace(strategy=strategy).compile(_hf.make_mesh(mesh)),
        )
    ]
    for one, split in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(split, one, atol=2e-6 * max(1, np.abs(one).max()))


def test_layer_norm_is_flaxs():
    x = jax.random.normal(jax.random.key(0), (3, 8)) + 2
    norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))
    scale, bias = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
    norm.scale[...], norm.bias[...] = scale, bias
    np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), norm(x), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"loss_chunks": 4, "logit_softcap": 3.0}, pytest.param({}, marks=pytest.mark.slow)],
)
def test_padding_reaches_neither_loss_nor_gradients(changes):
    folder, tokens = _hf.ROOT / "llama", _hf.golden("llama")["tokens"]
    config = sk.hf.decoder_config(folder, vocab_padding=6, **changes)
    padded = _hf.load(folder, config=config, vocab_padding=6)
    # Rows that would win every softmax.
    padded["embedding"] = padded["embedding"].at[98:].set(9.0)
    padded["head"] = padded["head"].at[:, 98:].set(9.0)
    bare = dataclasses.replace(config, vocab_padding=0, loss_chunks=1)

    def run(config, params):
        def mean(params):
            loss, _ = decoder_model(config).loss_fn(params, _hf.make_batch(tokens), None)
            return loss.total / loss.weight

        return jax.jit(jax.value_and_grad(mean))(params)

    (loss, ours), (want, plain) = run(config, padded), run(bare, _hf.load(folder))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert not np.asarray(ours["embedding"])[98:].any()
    assert not np.asarray(ours["head"])[:, 98:].any()
    ours = {**ours, "embedding": ours["embedding"][:98], "head": ours["head"][:, :98]}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_a_shard_may_hold_padding_alone(mode, tmp_path):
    folder, sizes, want = _hf.ROOT / "gpt2", {"data": 2, "tensor": 4}, _hf.golden("gpt2")
    config = sk.hf.decoder_config(folder, vocab_padding=102)  # tokens end in shard 1 of 4
    spec, mesh = _hf.make_spec(config, sizes, mode=mode), _hf.make_mesh(sizes)
    params = sk.hf.load(folder, spec, mesh, vocab_padding=102)
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0), params=params)
    metrics, gradients = step.gradients(state, _hf.make_batch(want["tokens"]))
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-6)
    assert not np.asarray(gradients["embedding"])[98:].any()
    sk.hf.save(tmp_path / "gradients", gradients, like=folder, vocab_padding=102)
    ours = _hf.read_tensors(tmp_path / "gradients")["transformer.wpe.weight"]
    np.testing.assert_allclose(ours, want["gradient transformer.wpe.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "family"), table(("auto", "shard_map", "pipeline"), ("gemma", "gpt"), every=2)
)
def test_every_mesh_computes_what_one_device_does(mode, family):
    config = {"gemma": GEMMA, "gpt": GPT}[family]
    s, sizes = sk.strategies, {"data": 2, "fsdp": 2, "tensor": 2}
    strategy = s.data() | s.fsdp() | s.tensor(sequence=True)
    if mode == "pipeline":
        sizes = {"pipe": 2, "data": 2, "tensor": 2}
        strategy, mode = s.pipeline(micro_batches=2) | s.data() | s.tensor(), "auto"
    batch = make_batch(config, rows=8, length=16)
    spec = _hf.make_spec(config, rows=8, mode=mode).replace(batch=batch, strategy=strategy)
    report = sk.verify(spec, meshes=[_hf.make_mesh(sizes)], batches=[batch], steps=1)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bias": ("query", "ky")}, "Did you mean 'key'?"),
        ({"window": None}, "global_layers=(1, 3)"),
        ({"global_layers": (1, 4)}, "the layers are 0 to 3"),
        ({"rope_factor": 0.0}, "rope_factor=0.0"),
        ({"rope_bands": (4.0, 1.0, 64)}, "below high"),
        ({"attn_softcap": -1.0}, "attn_softcap=None"),
        ({"vocab_padding": -1}, "vocab_padding=0"),
        ({"loss_chunks": 5}, "vocab=30 + vocab_padding=2"),
        ({"experts": 4}, "experts compute SwiGLU"),
        ({"norm": "batch"}, "'rms' or 'layer'"),
        ({"normalize_shares": False}, "the decoder has no experts"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, part):
    with pytest.raises(sk.errors.ConfigError) as error:
        dataclasses.replace(GEMMA, **changes)
    assert part in str(error.value)
