"""Ready strategies on the reference decoder: specs leaf by leaf, and how they join."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.step._layout import resolve_layout

CONFIG = DecoderConfig(vocab=32, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, kv_heads=4)
MODEL = sk.from_nnx(lambda rngs: Decoder(CONFIG, rngs), decoder_loss)
ROWS, LENGTH = 8, 8
BATCH = {
    "inputs": np.random.default_rng(0).integers(0, 32, (ROWS, LENGTH)).astype(np.int32),
    "targets": np.random.default_rng(1).integers(0, 32, (ROWS, LENGTH)).astype(np.int32),
    "weights": (np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) > 20).astype(np.float32),
}
data, fsdp, tensor = sk.strategies.data, sk.strategies.fsdp, sk.strategies.tensor
BOTH = ("data", "fsdp")

CASES = {
    "data": (data(), {"data": 8}),
    "fsdp": (fsdp(), {"fsdp": 8}),
    "tensor": (tensor(), {"tensor": 4}),
    "sequence": (tensor(sequence=True), {"tensor": 4}),
    "data|tensor": (data() | tensor(), {"data": 2, "tensor": 4}),
    "data|sequence": (data() | tensor(sequence=True), {"data": 4, "tensor": 2}),
    "fsdp|tensor": (fsdp() | tensor(sequence=True), {"fsdp": 4, "tensor": 2}),
    "data|fsdp": (data() | fsdp(), {"data": 2, "fsdp": 4}),
    "all": (data() | fsdp() | tensor(), {"data": 2, "fsdp": 2, "tensor": 2}),
}


def expected(rows, width):
    """Specs of the decoder whose `embed` is split over `rows`, whose heads and mlp over `width`."""
    return {
        "embedding": P(width, rows),
        "head": P(rows, width),
        "norm": P(),
        "layers/attn_norm": P(),
        "layers/mlp_norm": P(),
        "layers/down": P(None, width, rows),
        "layers/gate": P(None, rows, width),
        "layers/up": P(None, rows, width),
        "layers/out": P(None, width, None, rows),
        **{f"layers/{name}": P(None, rows, width) for name in ("query", "key", "value")},
    }


SPECS = {
    "data": expected(None, None),
    "fsdp": expected("fsdp", None),
    "tensor": expected(None, "tensor"),
    "sequence": expected(None, "tensor"),
    "data|tensor": expected(None, "tensor"),
    "data|sequence": expected(None, "tensor"),
    "fsdp|tensor": expected("fsdp", "tensor"),
    "data|fsdp": expected("fsdp", None),
    "all": expected("fsdp", "tensor"),
}
ROWS_OVER = {"data|fsdp": BOTH, "all": BOTH, "fsdp|tensor": "fsdp", "fsdp": "fsdp"}


def mesh_of(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def same(one, other):
    """Whether two specs split alike; trailing whole dims do not count."""
    longest = max(len(one), len(other))
    padded = [tuple(spec) + (None,) * (longest - len(spec)) for spec in (one, other)]
    return padded[0] == padded[1]


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_has_the_documented_spec(name):
    strategy, sizes = CASES[name]
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    mesh = mesh_of(sizes)
    spec = sk.StepSpec(
        loss_fn=MODEL.loss_fn,
        optimizer=optax.sgd(0.1),
        init=MODEL.init,
        batch=batch,
        strategy=strategy,
    )
    layout = resolve_layout(spec, mesh)
    found = {path: s.spec for path, s in by_path(layout.shardings.params).items()}
    assert found.keys() == SPECS[name].keys()
    assert not {path: spec for path, spec in found.items() if not same(spec, SPECS[name][path])}
    rows = ROWS_OVER.get(name, "data" if "data" in name else None)
    assert all(same(s.spec, P(rows)) for s in jax.tree.leaves(layout.batch_shardings))


def test_a_model_without_names_is_split_over_its_largest_dims():
    step = sk.compile_step(
        lambda params, batch, key: ((batch @ params["w"]) ** 2).mean() + params["b"].sum(),
        optax.adam(1e-3),
        init=lambda key: {"w": jax.numpy.ones((16, 64)), "b": jax.numpy.ones(64)},
        batch=np.ones((8, 16), np.float32),
        mesh=sk.MeshSpec(fsdp=8).build(),
        strategy=fsdp(min_size=128),
    )
    assert step.shardings.params["w"].spec == P(None, "fsdp")
    assert step.shardings.params["b"].spec == P()
    assert step.shardings.opt_state[0].mu["w"].spec == P(None, "fsdp")


def test_joined_strategies_keep_the_options_of_either():
    joined = dataclasses.replace(data(), accumulate=4) | dataclasses.replace(tensor(), remat="full")
    assert joined.accumulate == 4
    assert joined.remat == "full"
    assert joined.kinds == data().kinds + tensor().kinds
    assert (data() | fsdp()).batch == P(BOTH)
    assert (data() | fsdp()).activations.spec(("batch", "embed")) == P(BOTH)


def test_a_kind_is_an_object_not_a_name():
    with pytest.raises(sk.errors.StepError, match="'own' is not a kind of parallelism"):
        sk.Strategy(kinds=("own",))


def test_options_that_differ_do_not_join_all_of_them_named():
    one = dataclasses.replace(data(), accumulate=4, remat="full")
    other = dataclasses.replace(tensor(), accumulate=2, remat="dots")
    with pytest.raises(sk.errors.StepError) as caught:
        one | other
    text = str(caught.value)
    assert "Two strategies cannot be combined." in text
    assert "4 in the first, 2 in the second" in text
    assert "'full' in the first, 'dots' in the second" in text
    assert "dataclasses.replace(strategy, ...)" in text


def test_two_rules_for_the_same_parameters_do_not_join():
    own = sk.Strategy(params=sk.PathRules({"**": P("data")}))
    with pytest.raises(sk.errors.StepError, match="both decide the parameters"):
        own | sk.Strategy(params=sk.PathRules({"**": P("tensor")}))
    assert (own | data()).params == own.params


def test_two_rules_for_the_batch_do_not_join():
    rule = sk.Strategy(batch=sk.PathRules({"**": P("data")}))
    with pytest.raises(sk.errors.StepError, match="both decide the batch"):
        rule | data()


def test_own_names_are_added_to_a_ready_strategy():
    own = tensor().with_names(params={"filters": "tensor"}, activations={"pixels": None})
    assert own.params.spec(("embed", "filters")) == P(None, "tensor")
    assert own.activations.spec(("batch", "pixels", "mlp")) == P(None, None, "tensor")
    assert own.kinds == tensor().kinds


def test_names_fit_only_a_strategy_with_a_table():
    with pytest.raises(sk.errors.StepError, match="no table of logical names to add to"):
        sk.Strategy().with_names(params={"filters": "tensor"})
    with pytest.raises(sk.errors.StepError, match="no table of logical names to add to"):
        sk.Strategy().with_names(activations={"pixels": None})
