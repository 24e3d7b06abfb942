"""`sk.lora` where an adapter would be lost, be rounded away, or compute something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def adapt(weight, loss, rank=2, **options):
    """A model of one weight `w`, and parameters whose B is not zero."""
    model = sk.lora(lambda key: {"w": weight}, loss, {"w": rank}, alpha=4, **options)
    params = model.init(KEY)
    params["lora"]["w"]["b"] += 1.0
    return model, params


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_inputs_without_fractions(dtype):
    weight = jnp.asarray(RNG.normal(size=(6, 4)), "f")
    x = jnp.asarray(RNG.integers(0, 9, (5, 6)) % (2 if dtype == "bool" else 9), dtype)

    def loss(params, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["w"] / 50))

    def by_hand(factors, x):
        return jnp.mean(jnp.tanh(x @ (weight + 2 * factors["a"] @ factors["b"]) / 50))

    model, params = adapt(weight, loss)
    own = params["lora"]["w"]

    def run(factors):
        return model.loss_fn({**params, "lora": {"w": factors}}, x, KEY)

    found, want = jax.value_and_grad(run)(own), jax.value_and_grad(by_hand)(own, x.astype("f"))
    assert float(jnp.abs(want[1]["a"]).max()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want)
    # With dropout, an element is 0 or 1 / (1 - rate) of what it was: no integer.
    ones = jnp.ones((4000, 6), dtype)
    dropped = adapt(weight * 0, lambda p, b, k: jnp.mean(b @ p["w"]), dropout=0.2)[0]
    plain = model.merge({"w": weight * 0, "lora": params["lora"]})["w"]
    drawn = dropped.loss_fn({"w": weight * 0, "lora": params["lora"]}, ones, KEY)
    np.testing.assert_allclose(drawn, jnp.mean(ones.astype("f") @ plain), rtol=0.1)


def test_a_weight_that_is_rounded_to_integers_is_refused():
    def loss(params, batch, key):
        return jnp.mean(batch @ params["w"].astype(jnp.int8))

    model, params = adapt(jnp.ones((6, 4)), loss)
    with pytest.raises(
        sk.errors.StepError, match=r"w f32\[6,4\] +goes into `convert_element_type`"
    ):
        model.loss_fn(params, jnp.ones((5, 6)), KEY)


def leaves_a_branch(params, batch, key):
    pick = jax.lax.cond(batch[0, 0] > 0, lambda w: w, jax.lax.stop_gradient, params["w"][1])
    return jnp.mean((batch @ params["w"][0] @ pick) ** 2)


def leaves_a_map(params, batch, key):
    turned = jax.lax.map(lambda w: w.T, params["w"])
    return jnp.mean((batch @ params["w"][0] @ turned[1]) ** 2)


def leaves_a_carry(params, batch, key):
    start = batch, jnp.zeros(params["w"].shape[1:])
    (x, last), _ = jax.lax.scan(lambda c, w: ((c[0] @ w, w), None), start, params["w"])
    return jnp.mean((x @ last) ** 2)


@pytest.mark.parametrize(
    ("loss", "where"),
    [(leaves_a_branch, "cond"), (leaves_a_map, "scan"), (leaves_a_carry, "scan")],
)
def test_a_weight_cannot_leave_a_loop_or_a_branch(loss, where):
    """Elsewhere it is in a product, so that it is not one that has none."""
    model, params = adapt(jnp.ones((3, 4, 4)), loss, (2, "sio"))
    with pytest.raises(sk.errors.StepError, match=rf"w f32\[3,4,4\] +goes into `{where}`"):
        model.loss_fn(params, jnp.ones((5, 4)), KEY)


def test_a_glob_that_never_wins():
    def init(key):
        return {"up": jnp.ones((6, 4)), "down": jnp.ones((4, 6))}

    with pytest.raises(sk.errors.StepError, match=r"'up' +decides nothing: a glob before it"):
        sk.lora(init, lambda params, batch, key: 0.0, {"*": 8, "up": None})
    sk.lora(init, lambda params, batch, key: 0.0, {"up": None, "*": 8})


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_without_effect(alpha):
    with pytest.raises(sk.errors.StepError, match="is not positive and finite"):
        sk.lora(lambda key: {"w": jnp.ones((6, 4))}, lambda p, b, k: 0.0, {"w": 2}, alpha=alpha)


def test_parameters_that_cannot_be_merged_saved_or_read(tmp_path):
    model, params = adapt(jnp.ones((6, 4)), lambda p, b, k: 0.0)
    for call in (model.merge, model.base):
        with pytest.raises(sk.errors.StepError, match=r"has no lora/<path>/a and b .* merged ones"):
            call(model.merge(params))
    abstract = jax.eval_shape(lambda: params)
    numpy = jax.tree.map(np.asarray, params)
    for wrong in (numpy, abstract):
        with pytest.raises(
            sk.errors.StepError, match=r"lora/w/b +is .*, which has no sharding; Array"
        ):
            model.merge(wrong)
        with pytest.raises(sk.errors.StepError, match=r"  w +is .*, which has no sharding"):
            model.merge({**params, "w": wrong["w"]})
    with pytest.raises(sk.errors.CheckpointError, match=r"lora/w/b +is ShapeDtypeStruct, which"):
        model.save(tmp_path / "a", abstract)
    model.save(tmp_path / "a", numpy)
    for wrong in (numpy, abstract):
        with pytest.raises(
            sk.errors.CheckpointError, match=r"lora/w/a +is .*, which has no sharding"
        ):
            model.load(tmp_path / "a", wrong)
    with pytest.raises(sk.errors.CheckpointError, match="has no lora"):
        model.load(tmp_path / "a", model.merge(params))
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path / "a", params), params)
