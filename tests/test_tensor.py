"""Tensor parallelism: groups of key heads, and a vocabulary that is never whole."""

import re

import jax
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss

from ._quick import some_quick

tensor = sk.strategies.tensor
VOCAB = 88  # a size that no other dim has
TOKENS = np.zeros((4, 8), np.int32)
BATCH = {"inputs": TOKENS, "targets": TOKENS, "weights": np.ones((4, 8), np.float32)}


def compiled(strategy, **changes):
    sizes = {
        "vocab": VOCAB,
        "embed_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_dim": 48,
        **changes,
    }
    config = DecoderConfig(**sizes)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    return sk.compile_step(
        model.loss_fn,
        optax.sgd(0.1),
        init=model.init,
        batch=BATCH,
        mesh=sk.MeshSpec(tensor=4).build(devices=jax.devices()[:4]),
        strategy=strategy,
    )


def test_fewer_key_heads_than_devices_is_an_error_that_names_sizes_and_policy():
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(tensor(), kv_heads=2)
    text = str(caught.value)
    assert "params/layers/key f32[2,32,2,8]" in text
    assert "AxisRules['kv_heads' → 'tensor']: dim 2 (2) is not divisible by tensor=4" in text
    assert (
        'strategies.tensor(kv_heads="replicate") in mode="auto" for fewer groups than devices'
        in text
    )
    assert "MeshSpec(tensor=2)" in text
    assert "map 'kv_heads' to None" in text


def test_a_vocabulary_that_the_axis_does_not_divide_names_the_padding_that_does():
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(tensor(), vocab=VOCAB + 1)
    assert "vocab_padding=3 of DecoderConfig" in str(caught.value)
    padded = compiled(tensor(), vocab=VOCAB + 1, vocab_padding=3)
    assert padded.layout.state.params["head"].shape[-1] == VOCAB + 4


def test_a_policy_that_there_is_not():
    with pytest.raises(sk.errors.StepError) as caught:
        tensor(kv_heads="replicated")
    assert "Fix: kv_heads='replicate'" in str(caught.value)
    assert "known: 'split', 'replicate'. Did you mean 'replicate'?" in str(caught.value)


@pytest.mark.parametrize(
    ("sequence", "tied"), some_quick([(False, True), (True, False)], (True, False))
)
def test_no_device_ever_holds_the_whole_vocabulary(sequence, tied):
    step = compiled(
        tensor(sequence=sequence, kv_heads="replicate"), kv_heads=2, tie_embeddings=tied
    )
    dims = {
        int(n) for shape in re.findall(r"\w+\[([\d,]+)\]", step.hlo()) for n in shape.split(",")
    }
    assert VOCAB // 4 in dims
    assert VOCAB not in dims


def test_a_whole_vocabulary_would_be_seen():
    whole = tensor(kv_heads="replicate").with_names(activations={"vocab": None})
    assert re.search(rf"\[[\d,]*\b{VOCAB}\b", compiled(whole, kv_heads=2).hlo())
