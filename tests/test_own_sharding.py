"""A model's own constraints mean in a step what they mean under plain JAX, on every path of it."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._quick import some_quick

ROWS, WIDTH, HIDDEN = 32, 16, 24  # over tensor=4 a dim of 24 is 6, as nothing else here
MESH = sk.MeshSpec(data=2, tensor=4)
BATCH = {"x": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype("f")}
RULES = sk.AxisRules({"batch": "data", "mlp": "tensor", "gate": "tensor", "embed": None})
STRATEGY = sk.Strategy(params=sk.REPLICATED, batch=P("data"), activations=RULES)
SPEC = P("data", "tensor")
constraint = jax.lax.with_sharding_constraint


def init(key):
    up, down = (jax.random.normal(k, (WIDTH, HIDDEN)) / 4 for k in jax.random.split(key))
    return {"up": up, "down": down}


@jax.jit
def jitted(h):
    return constraint(h, SPEC)


def scanned(h):
    return jax.lax.scan(lambda h, _: (constraint(h, SPEC), None), h, None, length=2)[0]


@jax.custom_vjp
def with_rule(h):
    return constraint(h, SPEC)


with_rule.defvjp(lambda h: (constraint(h, SPEC), None), lambda _, g: (constraint(g, SPEC),))


def doubled_and_halved(h, **mesh):
    half = jax.shard_map(lambda x: x / 2, in_specs=SPEC, out_specs=SPEC, **mesh)
    return half(2 * h)


# Identities of f32[rows, 24], each of which splits the columns over tensor.
FORMS = {
    "spec": lambda h: constraint(h, SPEC),
    "spec of columns": lambda h: constraint(h, P(P.UNCONSTRAINED, "tensor")),
    "named": lambda h: constraint(h, NamedSharding(MESH.build(), SPEC)),
    "jit": jitted,
    "scan": scanned,
    "checkpoint": jax.checkpoint(lambda h: jnp.arctanh(jnp.tanh(constraint(h, SPEC)))),
    "derivative rule": with_rule,
    "vmap": jax.vmap(lambda row: constraint(row, P("tensor"))),
    "linen": lambda h: nn.with_logical_constraint(h, ("batch", "mlp")),
    "linen, boxed": lambda h: nn.LogicallyPartitioned(h, ("batch", "mlp")).unbox(),
    "partitioned": lambda h: nn.Partitioned(h, ("data", "tensor")).unbox(),
    "nnx": lambda h: nnx.Param(h, out_sharding=("batch", "mlp"))[...],
    "shard_map": doubled_and_halved,
    "shard_map of a mesh": lambda h: doubled_and_halved(h, mesh=MESH.build()),
    "constrain": lambda h: sk.nn.constrain(h, "batch", "mlp"),
}
EVERY = sk.Accumulate(2, "every")
MODES = {
    "plain": {},
    "remat": {"remat": "full"},
    "accumulate": {"accumulate": 2},
    "every": {"accumulate": EVERY},
    "reduce": {"precision": sk.Precision(reduce_dtype="bfloat16")},
    "accumulate, remat": {"accumulate": 2, "remat": "full"},
}
# A `shard_map` is not followed row by row, and not mapped over gradient shards.
TABLE = [
    (form, mode)
    for form in FORMS
    for mode in MODES
    if not (form.startswith("shard_map") and mode not in ("plain", "remat"))
]
QUICK = [
    ("spec", "accumulate"),
    ("named", "reduce"),
    ("derivative rule", "accumulate"),
    ("linen", "accumulate"),
    ("nnx", "plain"),
    ("shard_map", "plain"),
]


def make_loss(form):
    def loss_fn(params, batch, key):
        h = jax.lax.optimization_barrier(form(jnp.tanh(batch["x"] @ params["up"])))
        return jnp.mean((h @ params["down"].T) ** 2)

    return loss_fn


def reference(params):
    h = jnp.tanh(BATCH["x"] @ params["up"])
    return jnp.mean((h @ params["down"].T) ** 2)


def compiled(form, mesh=None, **options):
    options = {"strategy": STRATEGY, "init": init, "batch": BATCH, **options}
    mesh = MESH.build() if mesh is None else mesh
    return sk.compile_step(make_loss(form), optax.sgd(0.1), mesh=mesh, **options)


def assert_right(step, tolerance=1e-5):
    """Loss and gradients are those of one device, written by hand."""
    state = step.init(jax.random.key(0))
    loss, grads = jax.value_and_grad(reference)(jax.tree.map(np.asarray, state.params))
    metrics, seen = step.gradients(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for name, expected in grads.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(seen[name], expected, atol=tolerance * scale, err_msg=name)


def split_columns(step):
    """Whether an activation has 6 of the 24 columns on each device."""
    return bool(re.search(r"f32\[(1,)?(8|16),6\]", step.hlo()))


@pytest.mark.parametrize(("form", "mode"), some_quick(TABLE, *QUICK, slow=TABLE[::2]))
def test_a_constraint_lays_out_and_changes_no_number(form, mode):
    step = compiled(FORMS[form], **MODES[mode])
    assert_right(step, 2e-2 if mode == "reduce" else 1e-5)
    assert split_columns(step)


def test_without_a_constraint_nothing_is_split():
    assert not split_columns(compiled(lambda h: h))


def test_rows_stay_split_between_gradient_shards():
    step = compiled(FORMS["spec"], accumulate=2)
    # Of 16 rows of a micro-batch a device has 8, in the one gradient shard that is its own.
    assert re.search(r"f32\[(1,)?8,6\]", step.hlo())
    assert not re.search(r"f32\[2,8,(6|24)\]", step.hlo())
    assert step.report().notes == ()


def test_an_axis_of_the_shards_that_splits_another_dim_is_told():
    step = compiled(lambda h: constraint(h, P(None, ("data", "tensor"))), accumulate=2)
    assert_right(step)
    (note,) = step.report().notes
    assert "test_own_sharding.py:" in note
    assert "P(None, ('data', 'tensor')) splits a gradient shard no further over data" in note
    assert note[:40] in str(step.report()).replace("\n    ", "")


def test_a_weight_is_constrained_for_all_gradient_shards():
    def loss_fn(params, batch, key):
        up = constraint(params["up"], P("data", "tensor"))
        return jnp.mean((jnp.tanh(batch["x"] @ up) @ params["down"].T) ** 2)

    spec = {"init": init, "batch": BATCH, "strategy": STRATEGY, "accumulate": 2}
    step = sk.compile_step(loss_fn, optax.sgd(0.1), mesh=MESH.build(), **spec)
    assert_right(step)
    assert "f32[8,6]" in step.hlo()


def test_two_strategies_share_a_model_under_a_jit_of_its_module():
    @jax.jit
    def forward(h):
        return nn.with_logical_constraint(h, ("batch", "mlp"))

    whole = STRATEGY.with_names(activations={"mlp": None})
    assert split_columns(compiled(forward))
    assert not split_columns(compiled(forward, strategy=whole))


EXPLICIT = (AxisType.Explicit,) * 2


def explicit_mesh(types=EXPLICIT):
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=types)


def test_a_mesh_of_explicit_axes_is_taken_as_auto():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    assert mesh.axis_types == EXPLICIT
    step = compiled(FORMS["spec"], mesh, accumulate=2)
    assert step.mesh.axis_types == (AxisType.Auto,) * 2
    assert step.mesh.shape == mesh.shape
    assert_right(step)
    assert split_columns(step)
    (note,) = step.report().notes
    assert note == "mesh axes of type Explicit are taken as Auto, the partitioner's: data, tensor."
    placed = {"x": jax.device_put(BATCH["x"], NamedSharding(mesh, P("data")))}
    state = step.init(jax.random.key(0))
    assert step.evaluate(state, placed)["loss"] == step.evaluate(state, BATCH)["loss"]


def test_a_mesh_of_auto_axes_has_no_note_and_one_of_both_types_names_the_explicit_ones():
    assert compiled(FORMS["spec"]).report().notes == ()
    mixed = compiled(FORMS["spec"], explicit_mesh((AxisType.Explicit, AxisType.Auto)))
    assert mixed.report().notes[0].endswith(": data.")


def test_the_caller_s_mesh_and_rules_stay_as_they_were():
    other = sk.MeshSpec(data=4, tensor=2).build()
    rules = (("batch", None), ("mlp", None))
    with jax.set_mesh(other), nn.logical_axis_rules(rules):
        step = compiled(FORMS["linen"])
        assert_right(step)
        assert jax.sharding.get_mesh() == other
        assert nn.get_logical_axis_rules() == rules
    assert jax.sharding.get_abstract_mesh().empty
    assert nn.get_logical_axis_rules() == ()
    assert split_columns(step)


def test_init_may_constrain_and_name_dims():
    def own_init(key):
        params = init(key)
        named = nn.with_partitioning(lambda key, shape: params["up"], (None, "tensor"))
        up = nn.meta.unbox({"up": named(key, (WIDTH, HIDDEN))})["up"]
        down = nnx.Param(constraint(params["down"], P("data", None)), out_sharding=("embed", "mlp"))
        return {"up": up, "down": down[...]}

    step = compiled(FORMS["spec"], init=own_init)
    assert_right(step)
    assert step.init(jax.random.key(0)).params["up"].sharding.is_fully_replicated


OWN_MESH = "shard_map of a mesh"


@pytest.mark.parametrize("form", some_quick([form for form in FORMS if form != OWN_MESH], "spec"))
def test_verify_self_check_and_plan_take_the_model(form):
    spec = sk.StepSpec(
        loss_fn=make_loss(FORMS[form]),
        optimizer=optax.adam(0.1),
        init=lambda key: {k: sk.WithAxes(x, ("embed", "mlp")) for k, x in init(key).items()},
        batch=BATCH,
        strategy=STRATEGY,
    )
    report = sk.verify(spec, [MESH])
    assert report.check().ok
    step = spec.compile(MESH.build())
    assert step.self_check(step.init(jax.random.key(0)), BATCH).ok
    assert sk.plan(spec, "tpu:v5e:2x2").rows


@pytest.mark.slow
def test_one_device_cannot_run_a_shard_map_of_another_mesh():
    options = {"init": init, "batch": BATCH, "strategy": STRATEGY}
    loss_fn = make_loss(FORMS[OWN_MESH])
    spec = sk.StepSpec(loss_fn=loss_fn, optimizer=optax.sgd(0.1), **options)
    with pytest.raises(sk.errors.VerificationError, match=r"jax.shard_map.* without mesh="):
        sk.verify(spec, [MESH])
    assert sk.plan(spec.replace(strategy=sk.strategies.data()), "tpu:v5e:2x2").rows
