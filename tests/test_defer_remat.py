"""What waits for its gradient: `defer_remat` parts of a layer, and gradients gathered once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from shardkit.nn._constrain import constrain_gradient, constrain_p
from shardkit.nn._remat import defer_remat, parse_policy, remat, use_policy

from ._quick import some_quick

W = np.random.default_rng(0).normal(size=(3, 4, 4))


def loss(weights, x):
    def layer(x, w):
        part = defer_remat(lambda w, x: jnp.tanh(x @ w), "part_out")
        y = checkpoint_name(part(w, x), "part_out")
        return jnp.sin(x + y) @ w, None

    return jax.lax.scan(remat(layer, scanned=True), x, weights)[0].sum()


def checkpoints(jaxpr):
    own = sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in jaxpr.eqns)
    inner = [one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params)]
    return own + sum(map(checkpoints, inner))


@pytest.mark.parametrize(
    "name", some_quick(["none", "full", "save:part_out", "save:other"], "none", "save:part_out")
)
def test_a_part_waits_only_where_its_output_is_kept(name):
    # In 64 bits: one sum in another order is not what is looked for.
    with jax.enable_x64(True):
        x = jnp.ones((2, 4))
        plain = jax.grad(loss)(W, x)
        with use_policy(parse_policy(name)):
            traced = jax.make_jaxpr(lambda w, x: loss(w, x))(W, x)
            grads = jax.grad(lambda w, x: loss(w, x))(W, x)
        assert jnp.abs(grads - plain).max() <= 1e-12 * jnp.abs(plain).max()
    assert checkpoints(traced.jaxpr) == {"none": 0, "save:part_out": 2}.get(name, 1)


def test_the_gradient_alone_is_constrained():
    def named(jaxpr):
        return [eqn.params["names"] for eqn in jaxpr.eqns if eqn.primitive is constrain_p]

    names = ("batch", "embed")
    forward = jax.make_jaxpr(lambda x: constrain_gradient(x, names))(jnp.ones((2, 4)))
    backward = jax.make_jaxpr(jax.grad(lambda x: (constrain_gradient(x, names) ** 2).sum()))(
        jnp.ones((2, 4))
    )
    assert not named(forward.jaxpr)
    assert named(backward.jaxpr) == [names]
