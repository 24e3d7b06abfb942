"""Options that change nothing in a step are findings; the same options where they work are none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk

WIDTH, LAYERS = 16, 4
BATCH = {"x": np.ones((16, WIDTH), "f")}


def init(key):
    return {"layers": jnp.ones((LAYERS, WIDTH, WIDTH)), "head": jnp.ones((WIDTH, WIDTH))}


def loss_with(wrap=lambda layer: layer, scanned=True, wide=False):
    def loss(params, batch, key):
        if wide:
            params = jax.tree.map(lambda w: w.astype(jnp.float32), params)

        def layer(x, w):
            return jnp.tanh(x @ w), None

        layer, x = wrap(layer), batch["x"].astype(params["head"].dtype)
        if scanned:
            x, _ = jax.lax.scan(layer, x, params["layers"])
        for w in () if scanned else params["layers"]:
            x, _ = layer(x, w)
        return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)

    return loss


def reported(loss, strategy=None, sizes=None, **options):
    sizes = sizes or {"data": 2}
    return sk.compile_step(
        loss,
        options.pop("optimizer", optax.sgd(0.1)),
        init=options.pop("init", init),
        batch=BATCH,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))]),
        strategy=strategy or sk.strategies.data(),
        **options,
    ).report()


def idle(report, kind="idle_option"):
    return [finding for finding in report.findings if finding.kind == kind]


def marked(layer):
    return sk.nn.remat(layer, scanned=True)


@pytest.mark.parametrize("scanned", [True, False])
def test_remat_without_a_marked_layer(scanned):
    (finding,) = idle(reported(loss_with(scanned=scanned), remat="full"))
    assert "remat='full' finds no layer that the model marks" in finding.why
    assert "layer = sk.nn.remat(layer)" in finding.fix
    # Its fix: less memory for no more FLOPs.
    before, after = (reported(loss_with(wrap), remat="full") for wrap in (lambda f: f, marked))
    assert not idle(after)
    assert after.memory.temp < before.memory.temp
    assert after.flops.recompute < before.flops.recompute


@pytest.mark.parametrize("scanned", [True, False])
def test_remat_on_top_of_the_models_own(scanned):
    loss = loss_with(jax.checkpoint, scanned)
    (finding,) = idle(top := reported(loss, remat="full"))
    assert "on top of the model's own jax.checkpoint at test_idle_options.py:" in finding.why
    assert finding.fix.startswith('remat="none"')
    own = reported(loss)
    assert not idle(own)
    assert own.flops.recompute < top.flops.recompute


def test_a_checkpoint_of_a_part_of_a_marked_layer_is_none():
    assert not idle(reported(loss_with(lambda f: marked(jax.checkpoint(f))), remat="full"))


def test_bf16_where_every_product_stays_wide():
    (finding,) = idle(reported(loss_with(wide=True), precision="bfloat16"))
    assert "all 3 products of the loss have wider operands" in finding.why
    assert 'precision="float32"' in finding.fix
    assert not idle(reported(loss_with(), precision="bfloat16"))
    assert not idle(reported(loss_with(wide=True)))


def test_a_models_own_bf16_stays_bf16_by_default():
    def narrow(key):
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16), init(key))

    leaves = [leaf for leaf in reported(loss_with(), init=narrow).leaves if leaf.part == "params"]
    assert {leaf.dtype for leaf in leaves} == {"bf16"}


def test_a_pipeline_whose_stages_hold_every_layer():
    def loss(params, batch, key):
        def layer(w, x, batch, key):
            return jnp.tanh(x @ w)

        def last(outer, x, batch):
            return jnp.mean(jnp.square(x @ outer))

        def first(outer, batch, key):
            return batch["x"]

        return sk.nn.layer_stack(first, layer, last, params["head"], params["layers"], batch, key)

    def naming(dim):
        made = {"layers": (dim, None, None), "head": (None, None)}
        return lambda key: {k: sk.WithAxes(w, made[k]) for k, w in init(key).items()}

    stages = sk.strategies.pipeline(micro_batches=2)
    whole, split = (
        reported(loss, stages, {"pipe": 2}, init=make) for make in (naming(None), naming("layers"))
    )
    (finding,) = idle(whole)
    assert finding.axes == ("pipe",)
    assert finding.bytes == 4 * (LAYERS + 1) * WIDTH**2 // 2
    assert "each of its 2 stages holds the parameters of all layers" in finding.why
    assert not idle(split)
    assert split.ledger.total() < whole.ledger.total()


@pytest.mark.parametrize("split", [False, True])
def test_model_state_that_is_whole_beside_split_parameters(split):
    def with_average(key):
        return sk.Variables(init(key), {"ema": init(key)})

    def loss(params, batch, key, state):
        return loss_with()(params, batch, key), {}, state

    rule = sk.shard_largest("fsdp", min_size=64)
    strategy = sk.Strategy(params=rule, batch=P("fsdp"), **({"model_state": rule} if split else {}))
    report = reported(sk.Loss(loss, loss, stateful=True), strategy, {"fsdp": 2}, init=with_average)
    assert report.memory.model_state == 4 * (LAYERS + 1) * WIDTH**2 // (2 if split else 1)
    found = idle(report, "replicated_model_state")
    assert [one.leaf for one in found] == ([] if split else [
        "model_state/ema/layers", "model_state/ema/head"])  # fmt: skip
    if found:
        assert found[0].bytes == 4 * LAYERS * WIDTH**2 // 2
        assert "model_state=strategy.params" in found[0].fix


@pytest.mark.parametrize("rows", ["data", ("data", "spare")])
def test_an_axis_that_only_the_update_uses(rows):
    strategy = sk.Strategy(
        params=sk.REPLICATED,
        batch=P(rows),
        opt_state=sk.PathRules({"**/layers": P(None, "spare"), "**": sk.REPLICATED}),
    )
    report = reported(loss_with(), strategy, {"data": 2, "spare": 2}, optimizer=optax.adam(0.1))
    found = idle(report, "idle_axis")
    if rows != "data":  # as its fix says
        assert not found
        return
    assert [one.axes for one in found] == [("spare",)]
    assert "its 2 devices compute the same gradients" in found[0].why
    assert "name 'spare' in the batch" in found[0].fix
