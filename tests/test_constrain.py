"""`sk.nn.constrain`: never dropped, never baked into a cached jaxpr, nothing outside a step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.nn._constrain import use_resolver
from shardkit.step._activations import Activations, constraints
from shardkit.step._ambient import no_ambient_mesh

MESHES = {"2x4": {"data": 2, "tensor": 4}, "4x2": {"data": 4, "tensor": 2}}
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
TABLE = sk.AxisRules({"batch": "data", "mlp": "tensor", "embed": None})


@pytest.fixture(scope="module")
def meshes():
    return {name: sk.MeshSpec(**sizes).build() for name, sizes in MESHES.items()}


def lowered(fn, mesh, *args, rules=TABLE, shard_axes=()):
    """StableHLO of a fresh function, its names resolved as a step does."""
    names = Activations(mesh, rules, shard_axes)
    with no_ambient_mesh(), use_resolver(names):
        return jax.jit(lambda *xs: fn(*xs)).lower(*args).as_text()


def placed(text):
    return re.findall(r"sdy\.sharding_constraint .*?<@\w+, (\[.*?\])>", text)


def scanned(body, x):
    return jax.lax.scan(body, x, None, length=2)[0]


def body(carry, _):
    return sk.nn.constrain(jnp.sin(carry), "batch", "mlp"), None


@jax.jit
def inner(x):
    return sk.nn.constrain(x * 2, "batch", "mlp")


@jax.custom_vjp
def clipped(x):
    return sk.nn.constrain(x, "batch", "mlp")


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (sk.nn.constrain(g, "batch", None),))


def test_each_mesh_and_strategy_gets_its_own_constraints_from_one_cached_body(meshes):
    def model(x):
        return inner(scanned(body, x))

    turned = sk.AxisRules({"batch": "tensor", "mlp": "data", "embed": None})
    first = lowered(model, meshes["2x4"], X)
    second = lowered(model, meshes["4x2"], X)
    third = lowered(model, meshes["2x4"], X, rules=turned)
    again = lowered(model, meshes["2x4"], X)
    assert first == again
    assert placed(first) == placed(second) == ['[{"data"}, {"tensor"}]'] * 2
    assert placed(third) == ['[{"tensor"}, {"data"}]'] * 2
    assert '"data"=2, "tensor"=4' in first
    assert '"data"=4, "tensor"=2' in second


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        # The partitioner is told of a dim that is split already before it is split finer ...
        ("data", ['[{"data"}, {}]', '[{"data", "tensor"}, {}]']),
        # ... and nothing of one that is whole, or that is split no finer.
        (None, ['[{"data", "tensor"}, {}]']),
        (("data", "tensor"), ['[{"data", "tensor"}, {}]']),
    ],
)
def test_a_source_is_stated_where_a_dim_is_split_finer(meshes, length, expected):
    rules = sk.AxisRules({"length": length, "stream": ("data", "tensor"), "embed": None})

    def cut(x):
        return sk.nn.constrain(x * 2, "stream", "embed", source=("length", "embed"))

    assert placed(lowered(cut, meshes["2x4"], X, rules=rules)) == expected
    mapped = lowered(jax.vmap(cut), meshes["2x4"], jnp.ones((3, *X.shape)), rules=rules)
    assert len(placed(mapped)) == len(expected)


def test_a_gradient_passes_a_stated_source_the_other_way_round(meshes):
    rules = sk.AxisRules({"length": "data", "stream": ("data", "tensor"), "embed": None})

    def loss(x):
        return (sk.nn.constrain(x, "stream", "embed", source=("length", "embed")) ** 2).sum()

    finer, coarser = '[{"data", "tensor"}, {}]', '[{"data"}, {}]'
    steps = placed(lowered(jax.grad(loss), meshes["2x4"], X, rules=rules))
    assert steps == [coarser, finer, finer, coarser]


def count_of(fn, *args):
    return len(list(constraints(jax.make_jaxpr(fn)(*args).jaxpr)))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: sk.nn.constrain(x, "batch", "mlp").sum(), 1),
        (jax.grad(lambda x: (sk.nn.constrain(x, "batch", "mlp") ** 2).sum()), 2),
        (jax.grad(lambda x: (scanned(body, x) ** 2).sum()), 2),
        (jax.grad(lambda x: (jax.checkpoint(inner)(x) ** 2).sum()), 2),
        (jax.grad(lambda x: (clipped(x) ** 2).sum()), 2),
        (lambda x: jax.lax.cond(x.sum() > 0, inner, lambda y: y, x), 1),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() > 9, lambda c: body(c, 0)[0], x), 1),
        (lambda x: jax.vmap(lambda row: sk.nn.constrain(row, "mlp"))(x), 1),
        (lambda x: jax.jvp(inner, (x,), (x,)), 2),
    ],
    ids=["plain", "grad", "scan", "remat", "custom_vjp", "cond", "while", "vmap", "jvp"],
)
def test_the_program_holds_as_many_constraints_as_the_jaxpr(fn, expected, meshes):
    assert count_of(fn, X) >= expected
    assert len(placed(lowered(fn, meshes["2x4"], X))) == count_of(fn, X)


def test_a_dim_that_vmap_adds_is_left_to_the_compiler(meshes):
    def rows(x):
        return jax.vmap(lambda row: sk.nn.constrain(row, "mlp"), in_axes=1, out_axes=1)(x)

    assert placed(lowered(rows, meshes["2x4"], jax.ShapeDtypeStruct((16, 8), jnp.float32))) == [
        '[{"tensor"}, {?}]'
    ]


def test_inside_a_gradient_shard_its_axes_split_nothing_else(meshes):
    def model(x):
        return jax.vmap(
            lambda rows: sk.nn.constrain(rows, "batch", "mlp"), axis_name="(gradient shards)"
        )(x)

    text = lowered(
        model, meshes["2x4"], jax.ShapeDtypeStruct((2, 4, 16), jnp.float32), shard_axes=("data",)
    )
    assert placed(text) == ['[{"data"}, {}, {"tensor"}]']


def test_outside_a_step_it_is_the_identity_under_every_transformation():
    x = jnp.arange(128.0).reshape(8, 16)
    constrained = functools.partial(lambda y: sk.nn.constrain(y, "any", "name"))
    np.testing.assert_array_equal(constrained(x), x)
    np.testing.assert_array_equal(jax.jit(constrained)(x), x)
    np.testing.assert_array_equal(jax.vmap(lambda r: sk.nn.constrain(r, "name"))(x), x)
    np.testing.assert_array_equal(jax.grad(lambda y: (constrained(y) ** 2).sum())(x), 2 * x)
    np.testing.assert_array_equal(jax.grad(lambda y: (clipped(y) ** 2).sum())(x), 2 * x)
    np.testing.assert_array_equal(scanned(body, x), jnp.sin(jnp.sin(x)))
    assert jax.eval_shape(constrained, X).shape == (8, 16)
    assert "sharding_constraint" not in jax.jit(constrained).lower(x).as_text()


def test_outside_a_step_an_ambient_mesh_changes_nothing(meshes):
    with jax.set_mesh(meshes["2x4"]):
        text = jax.jit(lambda x: sk.nn.constrain(x, "batch", "mlp")).lower(X).as_text()
    assert not placed(text)


def test_the_number_of_names_is_the_rank():
    with pytest.raises(
        sk.errors.StepError, match=r"constrain\('batch'\) +1 name for 2 dims of f32\[8,16\]"
    ):
        sk.nn.constrain(jnp.ones((8, 16)), "batch")


def compiled(mesh, *names, activations=TABLE, width=16):
    def loss_fn(params, batch, key):
        return jnp.mean(sk.nn.constrain(batch["x"] @ params["w"], *names) ** 2)

    return sk.compile_step(
        loss_fn,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, width))},
        batch={"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        mesh=mesh,
        strategy=sk.Strategy(batch=P("data"), activations=activations),
    )


def test_an_unknown_name_is_an_error_with_the_nearest_one(meshes):
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(meshes["2x4"], "batch", "mpl")
    text = str(caught.value)
    assert "1 constraint cannot be met on mesh (data=2, tensor=4)." in text
    assert "constrain('batch', 'mpl') f32[8,16]" in text
    assert "do not list logical axis 'mpl'. Did you mean 'mlp'?" in text
    assert "strategy.with_names(activations={'mpl': None})" in text


def test_a_dim_that_does_not_divide_is_an_error(meshes):
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(meshes["2x4"], "batch", "mlp", width=6)
    text = str(caught.value)
    assert "constrain('batch', 'mlp') f32[8,6]" in text
    assert "dim 1 (6) is not divisible by tensor=4" in text


def test_constraints_without_a_table_are_an_error_that_prints_one(meshes):
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(meshes["2x4"], "batch", "mlp", activations=None)
    text = str(caught.value)
    assert "the strategy has no table of activations" in text
    assert 'Strategy(activations=sk.AxisRules({"batch": None, "mlp": None}))' in text


def test_on_one_device_no_constraint_remains_but_names_are_still_checked():
    one = sk.MeshSpec(data=1, tensor=1).build(devices=jax.devices()[:1])
    assert not placed(lowered(inner, one, X))
    assert compiled(one, "batch", "mlp").mesh.size == 1
    with pytest.raises(sk.errors.ShardingError, match="Did you mean 'mlp'"):
        compiled(one, "batch", "mpl")


def test_a_caller_s_mesh_does_not_reach_the_step(meshes):
    mesh, other = meshes["2x4"], meshes["4x2"]
    plain = compiled(mesh, "batch", "mlp").hlo()
    with jax.set_mesh(other):
        under_set_mesh = compiled(mesh, "batch", "mlp").hlo()
    with pytest.warns(DeprecationWarning, match="mesh"), other:
        under_with = compiled(mesh, "batch", "mlp").hlo()
    assert unnumbered(plain) == unnumbered(under_set_mesh) == unnumbered(under_with)


def unnumbered(hlo):
    """A program without the table of source lines, which tells where the test called."""
    text = hlo[: hlo.find("\nFileNames")] if "\nFileNames" in hlo else hlo
    return re.sub(r"(stack_frame_id|source_line|source_end_line)=\d+", "", text)


def test_axes_that_are_manual_split_nothing(meshes):
    mesh = meshes["2x4"]

    def fn(x):
        return sk.nn.constrain(jnp.sin(x), "batch", "mlp")

    def over(*axes):
        specs = {"in_specs": P(axes), "out_specs": P(axes)}
        manual = jax.shard_map(fn, mesh=mesh, axis_names=set(axes), check_vma=False, **specs)
        found = placed(lowered(manual, mesh, jnp.ones((8, 8))))
        return [one for one in found if "?" not in one]  # an open dim is the shard_map's own

    assert over("data") == ['[{}, {"tensor"}]']
    assert over("data", "tensor") == []
