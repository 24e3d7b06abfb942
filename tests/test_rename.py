"""`Strategy.rename`: models with other logical names give the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.planner import SearchSpace
from shardkit.sweeps._spec_factory import SpecFactory

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


@pytest.mark.parametrize("name", some_quick(STRATEGIES, "all-to-all, tensor"))
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


@pytest.fixture
def conventional(monkeypatch):
    """The same model with the conventional names."""
    spec, original = spec_with(S.fsdp()), {new: old for old, new in NAMES.items()}
    constrain = sk.nn.constrain

    def init_conventional(key):
        leaves, tree = jax.tree.flatten(init(key), is_leaf=lambda x: isinstance(x, sk.WithAxes))
        named = [sk.WithAxes(x.value, tuple(original[n] for n in x.axes)) for x in leaves]
        return jax.tree.unflatten(tree, named)

    def loss_conventional(params, batch, key):
        with monkeypatch.context() as patched:
            renaming = lambda x, *names: constrain(x, *(original[n] for n in names))  # noqa: E731
            patched.setattr(sk.nn, "constrain", renaming)
            return loss(params, batch, key)

    return spec.replace(init=init_conventional, loss_fn=loss_conventional)


def test_a_plan_lays_out_the_names_that_the_spec_renames(conventional):
    space = SearchSpace(remat=("full",), accumulate=(1, 2), pipelines=("1f1b",))
    expected = sk.plan(conventional, "tpu:v5p:2x2x1", space=space)
    renamed = spec_with(S.fsdp().rename(NAMES))
    planned = sk.plan(renamed, "tpu:v5p:2x2x1", space=space)
    rows = (*planned.rows, *planned.tight)
    assert any(one.mesh["tensor"] > 1 for one in rows)
    assert any(one.mesh["pipe"] > 1 for one in rows)
    assert any(one.mesh["context"] > 1 for one in rows)
    figures = [[(one.layout, one.total, one.seconds, one.wire) for one in (*made.rows, *made.tight)]
               for made in (planned, expected)]  # fmt: skip
    assert figures[0] == figures[1]
    assert planned.sensitivity == expected.sensitivity
    counts = [sorted(n for n, _ in made.rejected.values()) for made in (planned, expected)]
    assert counts[0] == counts[1]
    # The code of a layout declares the names too, those that its own tables list.
    best = next(one for one in rows if one.mesh["fsdp"] == one.mesh["tensor"] == 2)
    made: dict[str, object] = {"sk": sk}
    exec(best.declaration, made)
    mesh = made["mesh"].build(devices=jax.devices()[:4])
    step = renamed.replace(strategy=made["strategy"]).compile(mesh)
    assert step.shardings.params["up"].spec == P(None, "fsdp", "tensor")
    assert ".rename" not in expected.best.declaration


def test_a_sweep_adds_strategies_with_the_names_that_the_spec_renames():
    factory = SpecFactory(spec_with(S.fsdp().rename(NAMES)))
    made = factory(sk.MeshSpec(fsdp=2, tensor=2), accumulate=1, remat="none").strategy
    table = made.params.rules[0]
    assert table.spec(("depth", "hidden", "ffn")) == P(None, "fsdp", "tensor")
    assert made.activations.spec(("rows", "time", "ffn")) == P("fsdp", None, "tensor")


def test_a_name_of_activations_alone_is_not_renamed_into_itself():
    def positions(key):
        return {"positions": sk.WithAxes(jnp.ones((LENGTH, HIDDEN)), ("length", "embed"))}

    spec = sk.StepSpec(
        loss_fn=lambda params, batch, key: jnp.mean(params["positions"] * batch["x"]),
        optimizer=optax.sgd(0.1),
        init=positions,
        batch=rows(0),
        strategy=S.data() | S.tensor(),
    )
    with pytest.raises(sk.errors.ShardingError, match="does not list logical axis") as caught:
        spec.compile(sk.MeshSpec(data=4, tensor=2).build())
    assert "with_names(params={'length': None})" in str(caught.value)
    assert "rename" not in str(caught.value)
