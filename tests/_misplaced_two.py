"""Small models with two misplaced declarations each, of which either is told of by itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._misplaced import SEQUENCES, WIDTH, Case
from ._misplaced_rules import HEADS, PAIR, SHAPES

_pin = jax.lax.with_sharding_constraint
COLUMN, ROW, ROWS = P(None, "tensor"), P("tensor", None), P("data")
LENGTH, VOCAB = 32, 256
TOKENS = np.zeros((16, LENGTH), "i")


@dataclasses.dataclass
class Pair:
    """A step with two misplaced declarations.

    Attributes:
      both: the step.
      declarations: of each finding, from the one with the most bytes on, what is to change.
      mended: what the step has in place of both.
      less: whether it sends less then.
    """

    both: Case
    declarations: tuple[tuple[str, ...], ...]
    mended: Mapping[str, Any]
    less: bool = True


def normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def language_model(after=None, logits=None):
    """One block, with constraints behind attention and of the logits."""

    def loss(p, b, key):
        x = jnp.take(p["table"], b["tokens"], axis=0)
        q, k, v = (jnp.einsum("btd,dhk->bthk", normed(x), p[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v)
        mixed = _pin(mixed, after) if after else mixed
        x = x + jnp.einsum("bthk,hkd->btd", mixed, p["o"])
        x = x + jax.nn.gelu(normed(x) @ p["up"]) @ p["down"]
        out = x @ p["head"]
        out = _pin(out, logits) if logits else out
        picked = jnp.take_along_axis(out, b["labels"][..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(out, -1) - picked)

    return loss


def grouped_heads(p, b, key):
    """Two heads of keys and of values over four devices: each has half of a head."""
    q = (b["x"] @ p["q"]).reshape(16, LENGTH, 8, 16)
    k, v = ((b["x"] @ p[name]).reshape(16, LENGTH, 2, 16) for name in "kv")
    mixed = jax.nn.dot_product_attention(q, k, v)
    return jnp.mean((mixed.reshape(16, LENGTH, WIDTH) @ p["o"]) ** 2)


def transposed(p, b, key):
    """Weights as PyTorch has them, `[out, in]`."""
    x = b["x"] + jax.nn.gelu(b["x"] @ p["one"].T) @ p["two"].T
    return jnp.mean((x + jax.nn.gelu(x @ p["three"].T) @ p["four"].T) ** 2)


_BLOCK = {"table": (VOCAB, WIDTH), **HEADS, **SHAPES, "head": (WIDTH, VOCAB)}
_RULES = {
    "table": P(),
    **dict.fromkeys("qkv", P(None, "tensor", None)),
    "o": P("tensor", None, None),
    **PAIR,
    "head": COLUMN,
}
_BATCH = {"tokens": TOKENS, "labels": TOKENS}
_GROUPED = {"q": (WIDTH, WIDTH), "k": (WIDTH, 32), "v": (WIDTH, 32), "o": (WIDTH, WIDTH)}
_BY_GROUPS = {**dict.fromkeys("qkv", COLUMN), "o": ROW}
_TORCH = {"one": (512, WIDTH), "two": (WIDTH, 512), "three": (512, WIDTH), "four": (WIDTH, 512)}
_BY_TORCH = {"one": ROW, "two": COLUMN, "three": ROW, "four": COLUMN}
BY_LENGTH, BY_HEADS = P("data", "tensor"), P("data", None, "tensor")
WHOLE, BY_VOCAB = P("data", None, None), P("data", None, "tensor")
OF_A_CONSTRAINT = "the constraint at _misplaced_two.py"
TWO = {
    "a constraint and a rule": Pair(
        Case(language_model(BY_LENGTH), _BLOCK, {**_RULES, "up": ROW}, _BATCH),
        (('PathRules["up"] of params/up',), (OF_A_CONSTRAINT,)),
        {"loss": language_model(BY_HEADS), "rules": _RULES},
    ),
    "two constraints": Pair(
        Case(language_model(BY_LENGTH, WHOLE), _BLOCK, _RULES, _BATCH),
        ((OF_A_CONSTRAINT,), (OF_A_CONSTRAINT,)),
        {"loss": language_model(BY_HEADS, BY_VOCAB)},
    ),
    "two rules": Pair(
        Case(language_model(), _BLOCK, {**_RULES, "down": COLUMN, "head": ROW}, _BATCH),
        (('PathRules["down"] of params/down',), ('PathRules["head"] of params/head',)),
        {"rules": _RULES},
    ),
    "a batch spec and a constraint": Pair(
        Case(
            language_model(None, WHOLE),
            _BLOCK,
            _RULES,
            _BATCH,
            sk.PathRules({"tokens": ROWS, "labels": P(None, "data")}),
        ),
        (("the batch spec of batch/labels",), (OF_A_CONSTRAINT,)),
        {"loss": language_model(None, BY_VOCAB), "spec": ROWS},
    ),
    "heads that are not divided": Pair(
        Case(grouped_heads, _GROUPED, _BY_GROUPS, {"x": SEQUENCES}),
        (('PathRules["k"] of params/k', 'PathRules["v"] of params/v'),),
        {"rules": {**_BY_GROUPS, "k": P(), "v": P()}},
        less=False,
    ),
    "transposed weights": Pair(
        Case(transposed, _TORCH, {**_BY_TORCH, "two": ROW, "three": COLUMN}, {"x": SEQUENCES}),
        (('PathRules["three"] of params/three',), ('PathRules["two"] of params/two',)),
        {"rules": _BY_TORCH},
    ),
    "two that only cost together": Pair(
        Case(language_model(), _BLOCK, {**_RULES, "table": COLUMN, "up": ROW}, _BATCH),
        (('PathRules["up"] of params/up', 'PathRules["table"] of params/table'),),
        {"rules": {**_RULES, "table": ROW}},
    ),
}
