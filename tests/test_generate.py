"""Cached decoding against the full forward pass, and against the golden logits of torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from shardkit.lm import DecoderConfig, Generator, decoder_model
from shardkit.lm._cache import extend_cache, fill_cache
from shardkit.step import resolve_layout
from shardkit.step._activations import Activations

from . import _hf
from ._quick import some_quick
from .test_decoder_variants import GEMMA, GPT, SMALL

EXPERTS = {"experts": 4, "expert_mlp": 12, "shared_experts": 1}
VARIANTS = {
    "llama": DecoderConfig(**SMALL, kv_heads=2, rope_factor=8.0, rope_bands=(1.0, 4.0, 8)),
    "window": DecoderConfig(**SMALL, window=3, bias=True),
    "gemma": GEMMA,
    "gpt": GPT,
    "experts": DecoderConfig(**SMALL, **EXPERTS, qk_norm=True),
}
TOLERANCE = 1e-4


def parameters(config):
    """Random weights, also where a model starts at zero or one."""
    drawn = decoder_model(config).init(jax.random.key(0))
    drawn = jax.tree.map(lambda x: x.value, drawn, is_leaf=lambda x: isinstance(x, sk.WithAxes))
    leaves, structure = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [a + b for a, b in zip(leaves, noise, strict=True)])


def full_logits(config, params, tokens):
    model = decoder_model(config).bind(params)
    return model.logits(model(tokens))


def cached_logits(bind, known, params, tokens):
    """Logits of every position behind the first `known`, one token at a time."""
    model, (rows, size) = bind(params), tokens.shape
    first, cache = fill_cache(model, tokens[:, :known], jnp.full(rows, known - 1), size)

    def extend(cache, at):
        logits, cache = extend_cache(model, jnp.asarray(tokens)[:, at], jnp.full(rows, at), cache)
        return cache, logits

    rest = jax.lax.scan(extend, cache, jnp.arange(known, size))[1]
    return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], 1)


def run_cached(config, known, params, tokens):
    bind = decoder_model(config).bind
    return jax.jit(functools.partial(cached_logits, bind, known))(params, tokens)


def strategy():
    s = sk.strategies
    return s.data() | s.fsdp() | s.tensor(sequence=True)


def laid_out(config, params, sizes):
    """The parameters as a step on a mesh of these sizes has them."""
    spec = dataclasses.replace(_hf.make_spec(config, sizes, rows=8), strategy=strategy())
    mesh = _hf.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    layout = resolve_layout(spec, mesh)
    return jax.device_put(params, layout.shardings.params), mesh


@pytest.mark.parametrize("name", some_quick(VARIANTS, "window", "gemma"))
def test_cached_logits_equal_those_of_the_whole_row(name):
    config = VARIANTS[name]
    params = parameters(config)
    tokens = np.random.default_rng(0).integers(0, 30, (2, 14), np.int32)
    want = jax.jit(full_logits, static_argnums=0)(config, params, tokens)
    assert np.abs(np.asarray(want)[..., : config.vocab]).max() > 0.5
    found = run_cached(config, 4, params, tokens)
    np.testing.assert_allclose(found, want[:, 3:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", some_quick(_hf.FAMILIES, "gpt2", "gemma3", "qwen3_moe"))
def test_cached_logits_equal_the_golden_ones_of_torch(family):
    config, want = sk.hf.decoder_config(_hf.ROOT / family), _hf.golden(family)
    params = _hf.load(_hf.ROOT / family)
    known = 5
    found = run_cached(config, known, params, want["tokens"])
    np.testing.assert_allclose(found, want["logits"][:, known - 1 :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", some_quick(["gemma", "gpt", "experts"], "experts"))
def test_cached_logits_on_eight_devices(name):
    config = VARIANTS[name]
    params = parameters(config)
    tokens = np.random.default_rng(0).integers(0, 30, (4, 10), np.int32)
    want = jax.jit(full_logits, static_argnums=0)(config, params, tokens)
    placed, mesh = laid_out(config, params, _hf.EIGHT)
    names = Activations(mesh, Generator(config, mesh, strategy())._rules, ())
    run = functools.partial(cached_logits, decoder_model(config).bind, 4)
    with names.around_loss():
        found = jax.jit(run)(placed, tokens)
    np.testing.assert_allclose(found, want[:, 3:], atol=TOLERANCE, rtol=0)


def continue_by_hand(config, params, prompt, count):
    """The likeliest tokens, each from a full pass over a row in which all later ones are 0."""
    run = jax.jit(functools.partial(full_logits, config))
    row = np.zeros((1, len(prompt) + count), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), row.shape[1]):
        row[0, at] = np.asarray(run(params, row))[0, at - 1, : config.vocab].argmax()
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", some_quick(["gemma", "gpt"], "gemma"))
def test_greedy_tokens_equal_those_of_full_passes_on_every_mesh(name):
    config = VARIANTS[name]
    params = parameters(config)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    want = [continue_by_hand(config, params, prompt, 7) for prompt in prompts]
    assert len({tuple(row) for row in want}) == 3
    for sizes in (_hf.ONE, _hf.EIGHT):
        placed, mesh = laid_out(config, params, sizes)
        generator = Generator(config, mesh, strategy())
        found = generator(placed, prompts, count=7)
        assert [row.tolist() for row in found] == want
        stop = want[0][2]
        [first, *_] = generator(placed, prompts, count=7, stop=(stop,))
        assert first.tolist() == want[0][: want[0].index(stop) + 1]


def test_samples_depend_on_their_row_and_key_alone_and_compile_once():
    config = VARIANTS["llama"]
    params, mesh = laid_out(config, parameters(config), _hf.ONE)
    placed, eight = laid_out(config, parameters(config), _hf.EIGHT)
    generator, other = Generator(config, mesh, strategy()), Generator(config, eight, strategy())
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3]]

    def draw(generator, params, prompts, seed=0):
        options = {"count": 9, "temperature": 1.0, "key": jax.random.key(seed)}
        return [row.tolist() for row in generator(params, prompts, **options)]

    rows = draw(generator, params, prompts)
    assert draw(other, placed, prompts) == rows
    assert draw(generator, params, prompts[:2]) == rows[:2]
    assert rows[0] != rows[2]
    assert draw(generator, params, prompts, 1) != rows
    assert max(max(row) for row in rows) < config.vocab
    before = len(generator._programs)
    draw(generator, params, [[7] * 20, [8], [9, 9]])
    assert len(generator._programs) == before


def test_programs_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr("shardkit.lm._generate._KEPT", 2)
    params, mesh = laid_out(GPT, parameters(GPT), _hf.ONE)
    generator = Generator(GPT, mesh, strategy())
    kept = []
    for count in (1, 2, 1, 3):
        generator(params, [[1, 2]], count=count)
        kept.append([shapes[-2] for shapes in generator._programs])
    assert kept == [[1], [1, 2], [2, 1], [1, 3]]


def test_prompts_that_cannot_be_continued_are_named_together():
    generator = Generator(GPT, _hf.make_mesh(_hf.ONE), strategy())
    with pytest.raises(sk.errors.StepError) as error:
        generator({}, [[], [30], [1] * 10], count=7, temperature=1.0)
    text = str(error.value)
    assert "prompts[0]  is empty" in text
    assert "prompts[1]  has ids that are not in 0 to 29" in text
    assert "prompts[2]  has 10 tokens, and with count=7 more than the 16 positions" in text
    assert "key         is missing: temperature=1.0" in text
