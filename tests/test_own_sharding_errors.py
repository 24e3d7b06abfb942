"""A model's own sharding that cannot be met: refused with the line, before anything is compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk

RULES = sk.AxisRules({"batch": "data", "mlp": "tensor", "gate": "tensor", "embed": None})
STRATEGY = sk.Strategy(params=sk.REPLICATED, batch=P("data"), activations=RULES)
BATCH = {"x": jax.ShapeDtypeStruct((32, 16), jnp.float32)}
constraint, logical = jax.lax.with_sharding_constraint, nn.with_logical_constraint


def mesh(*sizes, kind=AxisType.Auto, first=0):
    devices = np.array(jax.devices())[first : first + np.prod(sizes)].reshape(sizes)
    return Mesh(devices, ("data", "tensor"), axis_types=(kind, kind))


def mapped(h, body=jnp.tanh, **options):
    return jax.shard_map(body, in_specs=P("data"), out_specs=P("data"), **options)(h)


def refuse(form, **options):
    options = {"strategy": STRATEGY, "batch": BATCH, "mesh": mesh(2, 4), **options}
    with pytest.raises(sk.ShardkitError) as raised:
        sk.compile_step(
            lambda params, batch, key: jnp.mean(form(batch["x"] @ params["w"]) ** 2),
            optax.sgd(0.1),
            init=lambda key: {"w": jax.random.normal(key, (16, 16))},
            **options,
        )
    return str(raised.value)


# form → what the error says, and its fix.
REFUSED = {
    "an unknown axis": (
        lambda h: constraint(h, P("dat", "tensor")),
        ("P('dat', 'tensor') uses axis 'dat'; mesh has data=2, tensor=4. Did you mean 'data'?",),
        "one of 'data', 'tensor'",
    ),
    "an axis twice": (
        lambda h: constraint(h, P("data", "data")),
        ("P('data', 'data') has duplicate entries for `data`",),
        "each mesh axis once",
    ),
    "too many entries": (
        lambda h: constraint(h, P("data", None, "tensor")),
        ("P('data', None, 'tensor') is only valid for values of rank at least 3",),
        "at most one entry per dim",
    ),
    "a dim that does not divide": (
        lambda h: constraint(h[:, :6], P("data", "tensor")),
        ("f32[32,6]", "dim 1 (6) is not divisible by tensor=4 (4 or 8 would be)"),
        "P('data')",
    ),
    "a mesh of another shape": (
        lambda h: constraint(h, NamedSharding(mesh(4, 2), P("data", "tensor"))),
        ("f32[32,16]", "on another mesh (data=4, tensor=2) of devices 0, 1, 2"),
        "with_sharding_constraint(x, P('data', 'tensor')), which means the mesh of the step",
    ),
    "a mesh of other devices": (
        lambda h: constraint(h, NamedSharding(mesh(2, 2, first=4), P("data"))),
        ("on another mesh (data=2, tensor=2) of devices 4, 5, 6, 7",),
        "with_sharding_constraint(x, P('data'))",
    ),
    "one device": (
        lambda h: constraint(h, SingleDeviceSharding(jax.devices()[0])),
        ("is constrained to a SingleDeviceSharding, which names no mesh axes",),
        "with_sharding_constraint(x, P(...))",
    ),
    "Explicit axes": (
        lambda h: constraint(h, NamedSharding(mesh(2, 4, kind=AxisType.Explicit), P("data"))),
        ("P('data') is on a mesh of Explicit axes, which a step takes as Auto",),
        "with_sharding_constraint(x, P(...))",
    ),
    "reshard": (
        lambda h: jax.sharding.reshard(h, P("data")),
        ("PartitionSpec passed to reshard cannot contain axis names that are of type Auto",),
        "with_sharding_constraint(x, P(...))",
    ),
    "out_sharding": (
        lambda h: jnp.einsum("ab,cb->ac", h, h, out_sharding=P("data")),
        ("PartitionSpec passed to einsum cannot contain axis names",),
        "with_sharding_constraint(x, P(...))",
    ),
    "manual axes": (
        lambda h: mapped(h, body=lambda x: constraint(x, P("data"))),
        ("P('data') names axes that are manual there, in a shard_map",),
        "sk.nn.constrain(x, ...), which leaves such axes out",
    ),
    "a shard_map of another mesh": (
        lambda h: mapped(h, mesh=mesh(4, 2)),
        ("shard_map is given another mesh than that of the step",),
        "jax.shard_map(...) without mesh=",
    ),
    "a shard_map that does not divide": (
        lambda h: mapped(h[:31]),
        ("the passed args[0] of shape float32[31,16]",),
        "sizes that divide",
    ),
    "a jit whose shardings do not divide": (
        lambda h: jax.jit(jnp.tanh, in_shardings=P(None, "tensor"))(h[:, :6]),
        ("P(None, 'tensor'): array axis 1 is partitioned 4 times, but the dimension size is 6",),
        "no in_shardings and out_shardings",
    ),
    "an unknown logical axis": (
        lambda h: logical(h, ("batch", "mpl")),
        ("logical axis 'mpl'", "activations do not list it. Did you mean 'mlp'?"),
        "strategy.with_names(activations={'mpl': None})",
    ),
    "two logical axes of one mesh axis": (
        lambda h: logical(h, ("gate", "mlp")),
        ("logical axis 'gate' is split over 'tensor', which splits another dim already",),
        "strategy.with_names(activations={'gate': None})",
    ),
    "a logical axis twice": (
        lambda h: logical(h, ("mlp", "mlp")),
        ("occur more than once in array names",),
        "a logical axis once in a constraint",
    ),
    "a logical axis that does not divide": (
        lambda h: logical(h[:, :6], ("batch", "mlp")),
        ("f32[32,6]", "dim 1 (6) is not divisible by tensor=4"),
        "P('data')",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_line_and_a_fix(name):
    form, said, fix = REFUSED[name]
    text = refuse(form)
    assert "on mesh (data=2, tensor=4)." in text
    assert "test_own_sharding_errors.py:" in text
    head, _, fixes = text.partition("Fix: ")
    for part in said:
        assert part in head
    assert fix in fixes


def test_all_that_do_not_divide_are_in_one_error():
    def form(h):
        six, seven = constraint(h[:, :6], P(None, "tensor")), logical(h[:, :7], (None, "batch"))
        return six + seven[:, :6]

    text = refuse(form)
    assert text.startswith("2 constraints cannot be met")
    assert "f32[32,6]" in text
    assert "f32[32,7]" in text


def test_logical_names_without_a_table_print_one():
    text = refuse(lambda h: logical(h, ("batch", None)), strategy=sk.Strategy(batch=P("data")))
    assert "the strategy has no table of activations" in text
    assert 'Strategy(activations=sk.AxisRules({"batch": None}))' in text


def test_on_shards_every_constraint_is_named():
    def form(h):
        return logical(jax.jit(lambda h: constraint(h, P("data")))(h), ("batch", "mlp"))

    text = refuse(form, mode="shard_map")
    assert 'mode="shard_map" does not support this step on mesh (data=2, tensor=4).' in text
    assert "P('data') means nothing where the loss sees one device's shard" in text
    assert "P('data', 'tensor') means nothing" in text
    assert text.count("with_sharding_constraint at ") == 2
    assert 'mode="auto"' in text


def test_on_shards_a_device_put_with_a_sharding_is_refused():
    where = NamedSharding(mesh(2, 4), P("data"))
    strategy = sk.Strategy(batch=P("data"))
    text = refuse(lambda h: jax.device_put(h, where), strategy=strategy, mode="shard_map")
    assert "a sharding of jax.device_put names 'data', which is manual there" in text
    assert "Fix: jax.device_put(x) without a sharding" in text


def test_on_shards_a_shard_map_is_refused_too():
    text = refuse(mapped, mode="shard_map", independent_rows=True)
    assert "shard_map at " in text
    assert "would map one device's shard again" in text
    assert "sk.ShardMapLoss(local, reference)" in text


@pytest.mark.parametrize(
    "form", [mapped, lambda h: jax.device_put(h, NamedSharding(mesh(2, 4), P("data")))]
)
def test_what_splits_the_rows_of_the_whole_batch_alone(form):
    """Each gradient shard has one row, which such a sharding cannot split."""
    text = refuse(form, batch={"x": jax.ShapeDtypeStruct((4, 16), jnp.float32)}, accumulate=2)
    assert "is written for 4 rows: fails on 1" in text
    assert "Fix: no sharding of its own that splits the rows; or the whole batch at once" in text


def test_a_constraint_on_another_mesh_over_gradient_shards():
    other = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    text = refuse(lambda h: constraint(h, NamedSharding(other, P("a", "b"))), accumulate=2)
    assert "is constrained on another mesh (a=2, b=4) of devices 0, 1, 2" in text
    assert "with_sharding_constraint(x, P('a', 'b')), which means the mesh of the step" in text


def test_on_shards_a_jit_with_shardings_is_refused():
    shardings = {"in_shardings": NamedSharding(mesh(2, 4), P("data"))}
    form = jax.jit(jnp.tanh, **shardings)
    text = refuse(form, mode="shard_map", strategy=sk.Strategy(batch=P("data")))
    assert "P('data') names axes that are manual there" in text
    assert "Fix: a jit inside the model without in_shardings and out_shardings" in text


def test_a_program_on_which_the_compiler_fails_is_told_with_its_line():
    """`pmean` over a manual axis of one device, beside an Auto one that splits the rows."""

    def form(h):
        def centred(x):
            return x - jax.lax.pmean(x.mean(1, keepdims=True), "tensor")

        by_column = P(None, "tensor")
        specs = {"in_specs": by_column, "out_specs": by_column}
        return jax.shard_map(centred, axis_names={"tensor"}, **specs)(h)

    alone = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "tensor"))
    text = refuse(form, mesh=alone)
    assert text.startswith("The compiler fails on this program.")
    assert "test_own_sharding_errors.py:" in text
    assert "INTERNAL: " in text
    assert "a mesh without its axes of size 1 (tensor)" in text


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"mode": "shard_map", "strategy": sk.Strategy(batch=P("data"))}],
    ids=str,
)
def test_callbacks_in_order(options):
    def form(h):
        jax.debug.print("{}", h[0, 0], ordered=True)
        jax.debug.callback(lambda x: None, h[0, 0], ordered=True)
        io_callback(lambda x: None, None, jax.lax.stop_gradient(h[0, 0]), ordered=True)
        jax.debug.print("{}", h[0, 0])
        return h

    text = refuse(form, independent_rows=True, **options)
    assert "A callback cannot keep its order on mesh (data=2, tensor=4)." in text
    assert "io_callback test_own_sharding_errors.py:" in text
    # Of those that JAX cannot map over gradient shards the first is told.
    assert text.count("is ordered, and each device has") == (1 if "accumulate" in options else 3)
    assert "Fix: ordered=False" in text


def test_a_shard_map_over_the_axes_of_gradient_shards():
    text = refuse(mapped, accumulate=2, independent_rows=True)
    assert "vmap spmd_axis_name cannot appear in shard_map in_specs" in text
    assert 'sk.Accumulate(k, "every")' in text


def test_the_rule_of_a_derivative_is_read_too():
    @jax.custom_vjp
    def form(h):
        return h

    def transpose(_, g):
        return (constraint(g[:, :6], P(None, "tensor")) @ jnp.ones((6, 16)),)

    form.defvjp(lambda h: (h, None), transpose)
    for options in ({}, {"accumulate": 2, "independent_rows": True}):
        assert "(6) is not divisible by tensor=4" in refuse(form, **options)


def test_errors_of_the_model_that_are_none_of_its_sharding_stay():
    with pytest.raises(TypeError, match="contracting dimensions"):
        refuse(lambda h: h @ jnp.ones((3, 3)))
