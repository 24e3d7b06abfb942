"""The decoder against an independent, unrolled one, and what it promises about its shape."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardkit._core.errors import ConfigError
from shardkit._core.tracing import equations
from shardkit.lm import SIZES, Decoder, DecoderConfig, decoder_loss, parameter_count
from shardkit.nn._constrain import use_resolver
from shardkit.nn._remat import parse_policy, use_policy

from ._quick import some_quick

CONFIG = DecoderConfig(vocab=48, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=40, kv_heads=2)


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
    for i in range(config.num_layers):
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
    head = w["embedding"].T if config.tie_embeddings else w["head"]
    log_p = jax.nn.log_softmax(plain_norm(x, w["norm"]) @ head)
    lse = jax.nn.logsumexp(plain_norm(x, w["norm"]) @ head, -1)
    nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    nll = nll + config.z_loss * lse**2
    return (nll * batch["weights"]).sum() / batch["weights"].sum()


@functools.cache
def split_decoder(config):
    """The graph and the parameters; built in one program, and norms away from one."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)

    @jax.jit
    def init():
        params = nnx.state(Decoder(config, nnx.Rngs(0)), nnx.Param)
        return jax.tree.map(
            lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params
        )

    return graph, init()


def mean_loss(graph, params, batch, key=None):
    mean, _ = decoder_loss(nnx.merge(graph, params), batch, key)
    return mean.total / mean.weight


def losses_and_grads(config, batch):
    graph, params = split_decoder(config)
    ours = jax.jit(jax.value_and_grad(lambda p: mean_loss(graph, p, batch)))(params)
    plain = jax.jit(jax.value_and_grad(lambda w: plain_loss(w, batch, config)))
    return (ours[0], nnx.to_pure_dict(ours[1])), plain(nnx.to_pure_dict(params))


@pytest.mark.parametrize(
    ("changes", "segments"),
    [
        pytest.param({}, False, marks=pytest.mark.slow),
        ({"tie_embeddings": True, "loss_chunks": 4, "z_loss": 1e-2}, True),
        pytest.param(
            {"kv_heads": None, "head_dim": 6, "loss_chunks": 3, "attention": "xla"},
            True,
            marks=pytest.mark.slow,
        ),
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


def test_published_sizes_have_their_published_parameter_counts():
    assert parameter_count(SIZES["llama2-7b"]) == 6_738_415_616
    assert parameter_count(SIZES["llama3-8b"]) == 8_030_261_248


def test_every_parameter_names_every_dim():
    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(CONFIG, nnx.Rngs(0))), nnx.Param)
    for path, param in nnx.to_flat_state(abstract):
        axes = param.get_metadata()["out_sharding"]
        assert len(axes) == len(param.get_value().shape), path
        assert ("layers" in axes) == ("layers" in path), path


def test_each_layer_starts_from_a_draw_of_its_own():
    _, params = split_decoder(CONFIG)
    gate = params["layers"]["gate"].get_value()
    assert not np.allclose(gate[0], gate[1], atol=0.1)


def test_depth_changes_the_shapes_of_the_program_and_nothing_else():
    def sizes(layers):
        config = DecoderConfig(**{**vars(CONFIG), "num_layers": layers})
        graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)
        batch = jax.eval_shape(lambda: make_batch(config))
        step = jax.grad(lambda p, b: mean_loss(graph, p, b))
        return len(re.findall(r"\n", str(jax.make_jaxpr(step)(params, batch))))

    # Depths of one digit, since a longer number may wrap a printed line.
    assert sizes(2) == sizes(8)


def test_dropout_needs_a_key_and_train_mode_and_differs_by_layer():
    config = DecoderConfig(**{**vars(CONFIG), "dropout": 0.5})
    graph, params = split_decoder(config)
    model, batch, key = nnx.merge(graph, params), make_batch(config), jax.random.key(1)
    run = jax.jit(lambda m, k: m(batch["inputs"], key=k))
    plain = run(model, None)
    assert not np.allclose(run(model, key), plain)
    assert not np.allclose(run(model, key), run(model, jax.random.key(2)))
    model.eval()
    np.testing.assert_array_equal(run(model, key), plain)


def test_a_token_sees_nothing_after_it_and_nothing_of_other_segments():
    graph, params = split_decoder(CONFIG)
    model, batch = nnx.merge(graph, params), make_batch(CONFIG)
    ids = jnp.asarray([[0] * 5 + [1] * 7] * 2)
    run = jax.jit(lambda inputs: model(inputs, ids))
    one = run(batch["inputs"])
    other = run(batch["inputs"].at[:, 3].add(1))
    changed = np.asarray(jnp.abs(one - other).max((0, 2)) > 0)
    np.testing.assert_array_equal(np.flatnonzero(changed), [3, 4])


def test_remat_policies_change_no_gradient():
    graph, params = split_decoder(CONFIG)
    batch = make_batch(CONFIG)
    want = jax.jit(jax.grad(lambda p: mean_loss(graph, p, batch)))(params)
    for name in ("full", "save:qkv,attn_mix,attn_out,mlp_out"):
        with use_policy(parse_policy(name)):
            loss = jax.make_jaxpr(lambda p: mean_loss(graph, p, batch))(params)
            got = jax.jit(jax.grad(lambda p: mean_loss(graph, p, batch)))(params)
        policies = [eqn.params.get("policy") for eqn in equations(loss.jaxpr)]
        assert policies.count(parse_policy(name)) == 1
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


MESH_AXES = {"batch": "data", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
MESH_AXES["vocab"] = "tensor"


def compiled_text(config, mesh):
    """HLO of the gradient with batch over data, and heads, mlp and vocabulary over tensor."""

    def place(names, *_):
        spec = jax.sharding.PartitionSpec(*(MESH_AXES.get(n) for n in names))
        return jax.sharding.NamedSharding(mesh, spec)

    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)
    specs = {p: place(x.get_metadata()["out_sharding"], None) for p, x in nnx.to_flat_state(params)}
    flat = jax.tree_util.tree_leaves_with_path(params)
    shardings = jax.tree.unflatten(
        jax.tree.structure(params), [specs[tuple(k.key for k in path[:-1])] for path, _ in flat]
    )
    batch = jax.eval_shape(lambda: make_batch(config, rows=4, length=128))
    step = jax.jit(
        jax.value_and_grad(lambda p, b: mean_loss(graph, p, b)),
        in_shardings=(shardings, place(("batch", None), None)),
    )
    with use_resolver(place):
        return step.lower(params, batch).compile().as_text()


@pytest.mark.parametrize("chunks", some_quick([1, 4], 4))
def test_sharded_heads_and_vocabulary_gather_nothing(chunks):
    config = DecoderConfig(
        vocab=64, embed_dim=32, num_layers=2, num_heads=8, mlp_dim=48, kv_heads=4
    )
    config = DecoderConfig(**{**vars(config), "loss_chunks": chunks})
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    text = compiled_text(config, mesh)
    kinds = set(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-permute)[(]", text))
    assert kinds == {"all-reduce"}, kinds


def test_sizes_that_do_not_fit_are_one_error():
    with pytest.raises(ConfigError) as caught:
        DecoderConfig(
            vocab=100, embed_dim=64, num_layers=2, num_heads=6, mlp_dim=8, kv_heads=4,
            loss_chunks=3, dropout=1.0, attention="cudn",
        )  # fmt: skip
    text = str(caught.value)
    assert "embed_dim=64 is not divisible by num_heads=6" in text
    assert "num_heads=4, or head_dim=64" in text
    assert "kv_heads=4" in text
    assert "does not divide num_heads=6" in text
    assert "loss_chunks=2" in text
    assert "dropout=1.0" in text
    assert "Did you mean 'cudnn'?" in text


def test_sizes_that_are_no_counts_are_named_with_their_values():
    with pytest.raises(
        ConfigError, match=r"num_heads +expected int, got 2.5(.|\n)*=0 .*at least 1"
    ):
        DecoderConfig(vocab=16, embed_dim=8, num_layers=0, num_heads=2.5, mlp_dim=8)
