"""`Strategy.rename`: models with other logical names give the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._quick import some_quick

S = sk.strategies
ROWS, LENGTH, HIDDEN, FFN, HEADS, DEPTH = 8, 16, 8, 16, 4, 2
NAMES = {
    "batch": "rows",
    "length": "time",
    "residual_length": "stream",
    "embed": "hidden",
    "mlp": "ffn",
    "heads": "queries",
    "kv_heads": "groups",
    "head_dim": "width",
    "layers": "depth",
}
STREAM = ("rows", "stream", "hidden")


def weights(key, *names):
    sizes = {"depth": DEPTH, "hidden": HIDDEN, "ffn": FFN, "queries": HEADS, "groups": HEADS}
    shape = tuple(sizes.get(name, HIDDEN // HEADS) for name in names)
    return sk.WithAxes(jax.random.normal(key, shape) / 4, names)


def init(key):
    keys = jax.random.split(key, 5)
    heads = ("queries", "groups", "groups")
    return {
        "qkv": [
            weights(k, "depth", "hidden", name, "width")
            for k, name in zip(keys, heads, strict=False)
        ],
        "up": weights(keys[3], "depth", "hidden", "ffn"),
        "down": weights(keys[4], "depth", "ffn", "hidden"),
    }


def layer(params, x, batch, key):
    x = sk.nn.constrain(x, *STREAM)
    q, k, v = (
        sk.nn.constrain(jnp.einsum("bte,ehd->bthd", x, w), "rows", "time", name, "width")
        for w, name in zip(params["qkv"], ("queries", "groups", "groups"), strict=True)
    )
    x = x + sk.nn.attention(q, k, v).reshape(x.shape)
    h = sk.nn.constrain(jnp.tanh(x @ params["up"]), "rows", "time", "ffn")
    return sk.nn.constrain(x + h @ params["down"], *STREAM)


def loss(params, batch, key):
    def first(ends, batch, key):
        return sk.nn.constrain(batch["x"], "rows", "time", "hidden")

    def last(ends, x, batch):
        return jnp.mean((x - batch["y"]) ** 2)

    return sk.nn.layer_stack(first, layer, last, {}, params, batch)


def rows(seed):
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal((ROWS, LENGTH, HIDDEN), np.float32) for name in ("x", "y")
    }


def spec_with(strategy):
    return sk.StepSpec(
        loss_fn=loss, optimizer=optax.adam(1e-2), init=init, batch=rows(0), strategy=strategy
    )


STRATEGIES = {
    "fsdp, context, tensor": (
        S.fsdp() | S.context() | S.tensor(sequence=True),
        {"fsdp": 2, "context": 2, "tensor": 2},
    ),
    "all-to-all, tensor": (
        S.context(attention="all_to_all") | S.tensor(),
        {"context": 2, "tensor": 2},
    ),
    "zero, pipeline": (S.zero() | S.pipeline(micro_batches=2), {"data": 2, "pipe": 2}),
}


@pytest.mark.parametrize("name", some_quick(STRATEGIES, "fsdp, context, tensor"))
def test_a_model_with_other_names_gives_the_numbers_of_one_device(name):
    strategy, sizes = STRATEGIES[name]
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    spec = spec_with(strategy.rename(NAMES))
    sk.verify(spec, meshes=[mesh], batches=[rows(0), rows(1)], steps=2).check()


def test_a_report_of_renamed_dims_knows_their_minima():
    strategy, sizes = STRATEGIES["fsdp, context, tensor"]
    step = spec_with(strategy.rename(NAMES)).compile(sk.MeshSpec(**sizes).build())
    assert step.shardings.params["up"].spec == P(None, "fsdp", "tensor")
    report = step.report()
    assert {least.axis for least in report.minima} == set(sizes)
    assert "unexplained_collective" not in {finding.kind for finding in report.findings}


def test_names_are_renamed_in_every_table_and_once_more():
    renamed = (S.zero() | S.tensor()).rename({"mlp": "ffn", "layers": "depth"})
    assert renamed.params.spec(("depth", "embed", "ffn")) == P(None, None, "tensor")
    assert renamed.activations.spec(("batch", "length", "ffn")) == P("data", None, "tensor")
    assert renamed.zero.last == ("depth",)
    again = renamed.rename({"ffn": "inner"})
    assert dict(again.names) == {"mlp": "inner", "layers": "depth"}
    assert again.params.spec(("embed", "inner")) == P(None, "tensor")
    assert again.conventional_names(("inner", None, "other")) == ("mlp", None, "other")


def test_unknown_and_doubled_names_are_refused_together():
    with pytest.raises(sk.errors.StepError) as caught:
        S.tensor().rename({"embd": "hidden", "mlp": "heads"})
    text = str(caught.value)
    assert "rename({'embd': 'hidden'})" in text
    assert "Did you mean 'embed'?" in text
    assert "rename({'mlp': 'heads'})" in text
    assert "two logical axes would be called 'heads'" in text


def test_two_names_may_be_swapped():
    swapped = S.tensor().rename({"mlp": "embed", "embed": "mlp"})
    assert swapped.params.spec(("mlp", "embed")) == P(None, "tensor")
