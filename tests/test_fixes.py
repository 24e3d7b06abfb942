"""Fixes of findings as the report words them: their code is pasted, and the finding is gone."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk

EMBED, MLP = 256, 1024
HAND = sk.Strategy(
    params=sk.PathRules({"up": P(None, "tensor"), "down": P("tensor", None)}),
    batch=P("data"),
    activations=sk.AxisRules({"batch": "data", "mlp": "tensor", "both": ("data", "tensor")}),
)


def init(key):
    return {
        "up": sk.WithAxes(jax.random.normal(key, (EMBED, MLP)), ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(key, (MLP, EMBED)), ("mlp", "embed")),
    }


def loss_with(*names):
    def loss(params, batch, key):
        with jax.named_scope("mlp"):
            hidden = sk.nn.constrain(jnp.tanh(batch["x"] @ params["up"]), *names)
            return jnp.mean((hidden @ params["down"]) ** 2)

    return loss


def compiled(loss, strategy=HAND, rows=64, init=init, width=EMBED):
    return sk.compile_step(
        loss,
        optax.adam(1e-3),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((rows, width), jnp.float32)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=strategy,
    )


def found(step, kind):
    return [one for one in step.report().findings if one.kind == kind]


def test_an_activation_that_is_constrained_gathers_no_parameter():
    # 4096 rows: the gathered `down` f32[1024,256] looks like a quarter of x f32[4096,256].
    step = compiled(loss_with("batch", None), rows=4096)
    (gather,) = found(step, "parameter_gather")
    assert gather.leaf == "params/down"
    code, *_ = gather.fix.partition(" on the activation")
    assert code == "sk.nn.constrain(x, ..., 'mlp')"
    assert {one.axes for one in found(step, "replicated_activation")} == {("tensor",)}
    assert not found(compiled(loss_with("batch", "mlp")), "parameter_gather")


def test_a_gradient_that_is_gathered_is_no_parameter():
    whole = sk.PathRules({"up": P(None, "tensor"), "*": P()})
    step = compiled(loss_with("batch", "mlp"), dataclasses.replace(HAND, params=whole))
    # As large as a shard of `up`, and of the gradient of `down`, which every device is to hold.
    assert step.report().ledger.where("tensor", "all-gather")
    assert not found(step, "parameter_gather")


def test_a_rule_of_a_finding_splits_the_leaf():
    strategy = dataclasses.replace(HAND, params=sk.AxisRules({"embed": None, "mlp": None}))
    names = {
        one.leaf: one for one in found(compiled(loss_with("batch", None), strategy), "replicated")
    }
    code, _, meant = names["params/up"].fix.partition(", or sk.REPLICATED")
    assert (
        code
        == """params=sk.first_match(sk.PathRules({"up": P(None, 'tensor')}), strategy.params)"""
    )
    assert meant == " if intended"
    own, *_ = names["opt_state/0/mu/down"].fix.partition(", or")
    assert own == """opt_state=sk.PathRules({"0/mu/down": P('tensor', None)})"""
    scope = {"sk": sk, "P": P, "strategy": strategy}
    changed = eval(f"dict({code}, {own})", scope)
    mended = dataclasses.replace(strategy, **changed)
    left = {one.leaf for one in found(compiled(loss_with("batch", None), mended), "replicated")}
    # Moments follow their parameter; those of `down` but one are as they were.
    assert left == {"params/down", "opt_state/0/nu/down"}


def test_a_constraint_in_between_spares_the_rematerialization():
    def init(key):
        return {"up": jax.random.normal(key, (32, 64)), "down": jnp.zeros(())}

    def loss_by(between):
        def loss(params, batch, key):
            with jax.named_scope("twist"):
                x = sk.nn.constrain(
                    jnp.sin(batch["x"][:, :, None] * params["up"]), "batch", None, "mlp"
                )
                x = between(x)
                return jnp.mean(jnp.cos(sk.nn.constrain(x, None, "both", None))) + params["down"]

        return loss

    rules = sk.PathRules({"up": P(None, "tensor"), "down": P()})
    strategy = dataclasses.replace(HAND, params=rules)
    given = {"strategy": strategy, "rows": 8, "init": init, "width": 32}
    remats = found(compiled(loss_by(lambda x: x), **given), "involuntary_remat")
    assert {one.bytes for one in remats} == {4 * 8 * 32 * 64}
    code, _, why = remats[0].fix.partition(" in between")
    assert why.startswith(", so that one mesh axis moves at a time; then measure")
    between = eval(f"lambda x: {code}", {"sk": sk})
    assert not found(compiled(loss_by(between), **given), "involuntary_remat")


def test_a_second_compile_names_what_changed():
    strategy = dataclasses.replace(HAND, params=sk.REPLICATED)
    step = compiled(loss_with("batch", None), strategy, rows=16, init=lambda key: {
        "up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}, width=8)  # fmt: skip
    state = step.init(jax.random.key(0))
    with pytest.warns(sk.RetraceWarning):
        step(state, {"x": jnp.ones((32, 8))})
    (finding,) = found(step, "second_compile")
    assert finding.leaf == "batch/x"
    assert "declared as f32[16,8], is f32[32,8]" in finding.why
