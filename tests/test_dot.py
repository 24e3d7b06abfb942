"""Every product of the reference model goes through `nn/_dot`, one place to change them all."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from shardkit._core.tracing import equations
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.nn import _dot, _expert_dispatch

SIZES = dict(vocab=32, embed_dim=16, num_layers=2, num_heads=4, kv_heads=2, mlp_dim=24)
MIXTURE = {"experts": 4, "top_k": 2, "balance_loss": 0.01, "router_z_loss": 0.001}
CONFIGS = {
    "dense": {},
    "tied, in chunks": {"tie_embeddings": True, "loss_chunks": 4},
    "bounded experts": {**MIXTURE, "capacity_factor": 1.0, "shared_experts": 1},
    "dropless experts": {**MIXTURE, "bias": True},
}
MARK = "through_dot"
ROWS = jax.ShapeDtypeStruct((2, 80), jnp.int32)  # two blocks of queries
BATCH = {"inputs": ROWS, "targets": ROWS, "weights": ROWS, "segment_ids": ROWS}


def marked(product):
    def call(*args, **kwargs):
        with jax.named_scope(MARK):
            return product(*args, **kwargs)

    return call


def products(function, *args):
    """`(primitive, whether it is marked)` of every product of a function."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [
        (eqn.primitive.name, MARK in str(eqn.source_info.name_stack))
        for eqn in equations(jaxpr)
        if "dot" in eqn.primitive.name or "conv_general" in eqn.primitive.name
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_product_of_the_decoder_and_its_gradient_goes_through_dot(config, monkeypatch):
    monkeypatch.setattr(_dot, "dot_general", marked(_dot.dot_general))
    ragged = marked(_dot.ragged_dot_general)
    monkeypatch.setattr(_expert_dispatch, "ragged_dot_general", ragged)
    made = nnx.eval_shape(lambda: Decoder(DecoderConfig(**SIZES, **CONFIGS[config]), nnx.Rngs(0)))
    graph, params = nnx.split(made)

    def loss(params, batch):
        model = nnx.merge(graph, params)
        hidden = model(batch["inputs"], batch["segment_ids"])
        return decoder_loss(model, batch, None)[0].total + model.logits(hidden).mean()

    found = products(jax.grad(loss), params, BATCH)
    assert len(found) > 20
    assert {name for name, _ in found} <= {"dot_general", "ragged_dot_general"}
    assert [name for name, through in found if not through] == []


def test_a_product_that_does_not_go_through_dot_is_seen():
    assert products(lambda x: x @ x, jnp.ones((2, 2))) == [("dot_general", False)]
