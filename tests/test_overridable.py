"""Overrides: a strategy computes a part of the model in its own way; nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.nn._overridable import Override, overridable, shard_mapped

DATA = sk.strategies.data() | sk.strategies.own("other")
BATCH = {"x": np.arange(32, dtype=np.float32).reshape(8, 4) / 32}


@dataclasses.dataclass(frozen=True)
class Scaled(Override):
    """Computes the plain function and scales it, so that a test can see who ran."""

    by: float = 1.0

    def __call__(self, around, plain, *args, **kwargs):
        assert around.row_axes == ("data",)
        assert around.spec(("batch",)) == P(("data",))
        return plain(*args, **kwargs) * self.by


def step_with(*overrides, mesh=None):
    def loss(params, batch, key):
        return overridable("product", product)(batch["x"], params["w"]).mean()

    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, 2))},
        batch=BATCH,
        mesh=mesh or sk.MeshSpec(data=4, other=2).build(),
        strategy=dataclasses.replace(DATA, overrides=tuple(("product", one) for one in overrides)),
    )


@jax.jit
def product(x, w):
    return x @ w


def loss_of(step):
    return float(step.evaluate(step.init(jax.random.key(0)), BATCH)["loss"])


def test_an_override_runs_where_its_axis_divides_the_work():
    plain = loss_of(step_with())
    assert loss_of(step_with(Scaled("other", 3.0))) == pytest.approx(3 * plain)
    assert loss_of(step_with(Scaled("absent", 3.0))) == plain
    assert loss_of(step_with()) == plain  # and leaves nothing behind in JAX's caches


def test_two_overrides_of_one_part_do_not_join():
    one, other = (
        dataclasses.replace(sk.strategies.data(axis), overrides=(("product", Scaled(axis)),))
        for axis in ("data", "other")
    )
    with pytest.raises(sk.errors.StepError, match="both override the model's product"):
        one | other


def test_a_part_that_the_model_lacks_is_an_error():
    strategy = dataclasses.replace(DATA, overrides=(("attention", Scaled("data")),))
    with pytest.raises(
        sk.errors.StepError, match=r"needs `sk.nn.attention`, but the model never calls it"
    ):
        step_with().replace(strategy=strategy)


def test_parts_inside_a_manual_region_are_those_of_the_other_axes():
    def loss(params, batch, key):
        def rows(x):
            assert x.shape == (2, 4)  # 8 rows over data=4, and no more over what is manual
            own = shard_mapped(lambda x: 2 * x, (("batch", None),), ("batch", None))
            return own(x)

        over = {"in_specs": P("data"), "out_specs": P("data"), "axis_names": {"data"}}
        mesh = sk.MeshSpec(data=4, other=2).build()
        return jax.shard_map(rows, mesh=mesh, check_vma=False, **over)(batch["x"]).mean()

    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, 2))},
        batch=BATCH,
        mesh=sk.MeshSpec(data=4, other=2).build(),
        strategy=sk.strategies.data() | sk.strategies.own("other"),
    )
    assert loss_of(step) == pytest.approx(2 * BATCH["x"].mean())
