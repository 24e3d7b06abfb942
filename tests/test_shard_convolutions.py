"""Gradients of convolutions on every layout: of whole batches and by gradient shard."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.errors import StepError

from ._tables import table

RNG = np.random.default_rng(0)
NWC, NHWC = ("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC")
NDHWC, NCHW = ("NDHWC", "DHWIO", "NDHWC"), ("NCHW", "OIHW", "NCHW")


def convolution(strides, padding, dims, **options):
    """A function of (x, w)."""
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dims,
        **options,
    )


def transposed(**options):
    return functools.partial(
        lax.conv_transpose, strides=(2, 2), padding="SAME", dimension_numbers=NHWC, **options
    )


# name: (shape of a row, shape of the kernel, its dim that other axes split, function)
KINDS = {
    "1 x 1": ((8, 8, 4), (1, 1, 4, 8), 3, convolution((1, 1), "SAME", NHWC)),
    "3 x 3": ((8, 8, 4), (3, 3, 4, 8), 3, convolution((1, 1), "SAME", NHWC)),
    "strided": ((8, 8, 4), (3, 3, 4, 8), 3, convolution((2, 2), "SAME", NHWC)),
    "1 x 1 strided": ((8, 8, 4), (1, 1, 4, 8), 3, convolution((2, 2), "VALID", NHWC)),
    "dilated": (
        (8, 8, 4),
        (3, 3, 4, 8),
        3,
        convolution((1, 1), "SAME", NHWC, rhs_dilation=(2, 2)),
    ),
    "grouped": (
        (8, 8, 4),
        (3, 3, 2, 8),
        3,
        convolution((1, 1), "SAME", NHWC, feature_group_count=2),
    ),
    "grouped, inputs split": (
        (8, 8, 4),
        (3, 3, 2, 8),
        2,
        convolution((1, 1), "SAME", NHWC, feature_group_count=2),
    ),
    "grouped 1 x 1": (
        (8, 8, 4),
        (1, 1, 2, 8),
        3,
        convolution((1, 1), "SAME", NHWC, feature_group_count=2),
    ),
    "depthwise": (
        (8, 8, 4),
        (3, 3, 1, 4),
        3,
        convolution((1, 1), "SAME", NHWC, feature_group_count=4),
    ),
    "1 dim": ((8, 4), (3, 4, 8), 2, convolution((1,), "SAME", NWC)),
    "3 dims": ((4, 4, 4, 4), (2, 2, 2, 4, 8), 4, convolution((1, 1, 1), "SAME", NDHWC)),
    "patches": ((8, 8, 4), (4, 4, 4, 8), 3, convolution((4, 4), "VALID", NHWC)),
    "transposed": ((4, 4, 4), (3, 3, 4, 8), 3, transposed()),
    "transposed kernel": ((4, 4, 4), (3, 3, 8, 4), 2, transposed(transpose_kernel=True)),
    "channels first": ((4, 8, 8), (8, 4, 3, 3), 0, convolution((1, 1), "SAME", NCHW)),
}
# name: (mesh, axes of the rows, axis of the kernel)
LAYOUTS = {
    "data": ({"data": 8}, "data", None),
    "data|fsdp": ({"data": 2, "fsdp": 4}, ("fsdp", "data"), "fsdp"),
    "data|tensor": ({"data": 4, "tensor": 2}, "data", "tensor"),
    "data|tensor, kernel whole": ({"data": 2, "tensor": 4}, "data", None),
    "tensor": ({"tensor": 2}, None, "tensor"),
}
GROUPED = [name for name in KINDS if name.startswith("grouped") or name == "depthwise"]
ACCUMULATE = {"accumulate": 2}
REDUCE = {"precision": sk.Precision(reduce_dtype="bfloat16")}


def assert_gradient_of_one_device(loss, init, batch, layout, split, **options):
    sizes, rows, axis = LAYOUTS[layout]
    spec = P(*[None] * split, axis)
    params = sk.PathRules({"w": spec, "**": sk.REPLICATED}) if axis else sk.REPLICATED
    mesh = sk.MeshSpec(**sizes)
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=batch,
        mesh=mesh.build(devices=jax.devices()[: math.prod(sizes.values())]),
        strategy=sk.Strategy(params=params, batch=P(rows)),
        **options,
    )
    state = step.init(jax.random.key(0))
    want = jax.grad(loss)(jax.device_get(state.params), batch, None)
    got = step.gradients(state, batch)[1]
    tolerance = 2e-2 if options == REDUCE else 1e-4

    def compare(got, want):
        assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()

    jax.tree.map(compare, got, want)


def assert_kind_is_right(kind, layout, per_device, **options):
    row, kernel, split, convolve = KINDS[kind]
    sizes, rows, _ = LAYOUTS[layout]
    devices = math.prod(sizes[axis] for axis in sizes if axis in (rows or ()))
    rows = per_device * devices * options.get("accumulate", 1)
    batch = {"x": RNG.normal(size=(rows, *row)).astype("f")}

    def loss(params, batch, key):
        # The scale needs the gradient of the input.
        return jnp.mean(jnp.tanh(convolve(batch["x"] * params["scale"], params["w"])) ** 2)

    def init(key):
        return {"w": jax.random.normal(key, kernel) / 3, "scale": jnp.ones(row)}

    assert_gradient_of_one_device(loss, init, batch, layout, split, **options)


@pytest.mark.parametrize(
    ("kind", "layout", "per_device", "options"),
    [
        ("1 x 1", "data", 2, ACCUMULATE),  # wrong by vmap for any number of rows
        ("3 x 3", "data|fsdp", 1, ACCUMULATE),  # these for one row on each device
        pytest.param("1 dim", "data|tensor", 1, ACCUMULATE, marks=pytest.mark.slow),
        ("grouped 1 x 1", "data|tensor", 1, REDUCE),
        pytest.param("grouped, inputs split", "data|tensor", 2, ACCUMULATE, marks=pytest.mark.slow),
        ("transposed", "data", 1, ACCUMULATE),
    ],
)
def test_a_convolution_has_the_gradient_of_one_device(kind, layout, per_device, options):
    assert_kind_is_right(kind, layout, per_device, **options)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("depthwise", "data|tensor, kernel whole"),  # w was 4 times too large
        ("grouped 1 x 1", "data|tensor, kernel whole"),
        ("grouped, inputs split", "data|tensor"),
        ("depthwise", "tensor"),
    ],
)
def test_a_grouped_convolution_of_a_whole_batch_is_right(kind, layout):
    assert_kind_is_right(kind, layout, 2)


@pytest.mark.slow
def test_grouped_convolutions_in_loops_branches_and_rules_are_right():
    """Depthwise and pointwise blocks in a scan, a conditional and a `custom_vjp`."""
    depthwise = KINDS["depthwise"][3]

    @jax.custom_vjp
    def twice_the_gradient(x, w):
        return depthwise(x, w)

    def backward(kept, dy):
        return jax.vjp(depthwise, *kept)[1](2 * dy)

    twice_the_gradient.defvjp(lambda x, w: (depthwise(x, w), (x, w)), backward)

    def block(x, w):
        return x + jnp.tanh(depthwise(x, w)), None

    def loss(params, batch, key):
        x = jax.nn.gelu(batch["x"] @ params["in"])
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
        x = jax.lax.cond(x.sum() > 1e9, lambda x: -x, lambda x: depthwise(x, params["w"]), x)
        return jnp.mean(jnp.tanh(twice_the_gradient(x, params["last"])) ** 2)

    def init(key):
        keys = jax.random.split(key, 4)
        kernel, draw = KINDS["depthwise"][1], jax.random.normal
        return {
            "in": draw(keys[0], (4, 4)),
            "layers": draw(keys[1], (2, *kernel)) / 3,
            "w": draw(keys[2], kernel) / 3,
            "last": draw(keys[3], kernel) / 3,
        }

    batch = {"x": RNG.normal(size=(16, 8, 8, 4)).astype("f")}
    for layout in ("data|tensor, kernel whole", "data|tensor"):
        assert_gradient_of_one_device(loss, init, batch, layout, 3)


def test_grouped_convolutions_of_a_few_rows_at_a_time_are_right():
    """The kernel's gradient was twice too large, also in plain JAX."""
    row, kernel, _, depthwise = KINDS["depthwise"]

    def loss(params, batch, key):
        def of_row(x):
            return jnp.mean(jnp.tanh(depthwise(x[None], params["w"])) ** 2)

        return jnp.mean(jax.lax.map(of_row, batch["x"], batch_size=4))

    batch = {"x": RNG.normal(size=(16, *row)).astype("f")}
    assert_gradient_of_one_device(
        loss, lambda key: {"w": jax.random.normal(key, kernel)}, batch, "data", 3
    )


@pytest.mark.parametrize("options", [{}, ACCUMULATE], ids=str)
@pytest.mark.parametrize(
    ("images", "kernel", "size"),
    [
        (P("data", "tensor"), P(None, None, None, "fsdp"), 3),  # w was twice too large
        (P("data"), P("tensor", None, None, "fsdp"), 4),  # the loss was wrong as well
    ],
)
def test_a_convolution_is_right_whatever_axes_split_its_spatial_dims(images, kernel, size, options):
    strides = (1, 1) if size == 3 else (2, 2)
    convolve = convolution(strides, "SAME", NHWC)

    def loss(params, batch, key):
        return jnp.mean(jnp.tanh(convolve(jnp.tanh(batch["x"] * params["s"]), params["w"])) ** 2)

    params = {"w": RNG.normal(size=(size, size, 4, 8)).astype("f") / 4, "s": np.ones(4, "f")}
    batch = {"x": RNG.normal(size=(8, 8, 8, 4)).astype("f")}
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: jax.tree.map(jnp.asarray, params),
        batch=batch,
        mesh=sk.MeshSpec(data=2, fsdp=2, tensor=2).build(),
        strategy=sk.Strategy(params=sk.PathRules({"w": kernel, "s": sk.REPLICATED}), batch=images),
        **options,
    )
    state = step.init(jax.random.key(0))
    want, grads = jax.value_and_grad(loss)(params, batch, None)
    metrics, got = step.gradients(state, batch)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(step.evaluate(state, batch)["loss"], want, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(got[name], grads[name], atol=1e-5 * np.abs(grads[name]).max())


@pytest.mark.parametrize("mapped", ["pipeline", "shard_map"])
def test_grouped_convolutions_where_only_some_axes_are_mapped_are_refused(mapped):
    """The gradients of four groups in a stage, on pipe=2, tensor=2, were wrong by their size."""
    mesh = sk.MeshSpec(pipe=2, data=2, tensor=2).build()
    row, kernel, _, grouped = KINDS["grouped 1 x 1"]

    def layer(w, x, *_):
        return x + grouped(x, w)[..., : row[-1]]

    def in_stages(params, batch, key):
        return sk.nn.layer_stack(
            lambda ends, batch, key: batch["x"] * ends,
            layer,
            lambda ends, x, batch: jnp.mean(x**2),
            params["scale"],
            params["w"],
            batch,
        )

    def in_shard_map(params, batch, key):
        specs = {"in_specs": (P(), P("pipe")), "out_specs": P("pipe"), "axis_names": {"pipe"}}
        run = jax.shard_map(layer, mesh=mesh, **specs)
        return jnp.mean(run(params["w"][0], batch["x"] * params["scale"]) ** 2)

    staged = dataclasses.replace(
        sk.strategies.pipeline(micro_batches=2),
        params=sk.PathRules({"w": P("pipe", None, None, None, "tensor"), "**": sk.REPLICATED}),
        batch=P("data"),
    )
    plain = sk.Strategy(params=sk.REPLICATED, batch=P("data"))
    loss, strategy = {
        "pipeline": (in_stages, staged),
        "shard_map": (in_shard_map, plain),
    }[mapped]
    with pytest.raises(StepError) as caught:
        sk.compile_step(
            loss,
            optax.sgd(0.1),
            init=lambda key: {
                "scale": jnp.ones(row),
                "w": jax.random.normal(key, (2, *kernel)),
            },
            batch={"x": np.ones((16, *row), "f")},
            mesh=mesh,
            strategy=strategy,
        )
    assert "wrong numbers for a grouped convolution" in str(caught.value)
    axes = "['data', 'pipe']" if mapped == "pipeline" else "['pipe']"
    assert f"groups, in a part of the step that maps {axes} alone" in str(caught.value)
    assert "and leaves 'tensor' to XLA" in str(caught.value)


@pytest.mark.parametrize("groups", [pytest.param(4, marks=pytest.mark.slow), 16])
def test_evaluation_and_self_check_of_grouped_convolutions_are_right(groups):
    """Four groups of channels that another axis splits: the forward pass was wrong as well."""
    grouped = convolution((1, 1), "SAME", NHWC, feature_group_count=groups)
    batch = {"x": RNG.normal(size=(16, 6, 6, 8)).astype("f")}

    def loss(params, batch, key):
        x = jnp.tanh(batch["x"] @ params["in"])
        return jnp.mean(jnp.tanh(grouped(x, params["w"])) ** 2)

    def init(key):
        draw, other = jax.random.normal, jax.random.fold_in(key, 1)
        return {"in": draw(key, (8, 16)) / 3, "w": draw(other, (1, 1, 16 // groups, 16)) / 3}

    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=batch,
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=sk.Strategy(
            params=sk.PathRules({"in": P(None, "tensor"), "w": sk.REPLICATED}), batch=P("data")
        ),
    )
    state = step.init(jax.random.key(0))
    want = loss(jax.device_get(state.params), batch, None)
    np.testing.assert_allclose(step.evaluate(state, batch)["loss"], want, rtol=1e-6)
    assert step.self_check(state, batch).ok


@pytest.mark.parametrize("kind", table(KINDS, every=9))
def test_every_convolution_has_the_gradient_of_one_device(kind):
    layouts = [name for name in LAYOUTS if name != "data|fsdp" or "inputs" not in kind]
    for layout, per_device in itertools.product(layouts, (1, 2, 4)):
        assert_kind_is_right(kind, layout, per_device, **ACCUMULATE)
    for layout, per_device in itertools.product(layouts, (1, 2)):
        assert_kind_is_right(kind, layout, per_device, **REDUCE)
    for layout in layouts:
        assert_kind_is_right(kind, layout, 2)


@pytest.mark.slow
def test_convolutions_in_loops_and_checkpoints_stay_apart():
    """Patches, then residual blocks without batch norm, scanned and recomputed."""
    row, _, _, patches = KINDS["patches"]
    batch = {"x": RNG.normal(size=(16, *row)).astype("f")}
    convolve = KINDS["1 x 1"][3]

    def block(x, w):
        return x + convolve(jnp.tanh(convolve(x, w["a"])), w["b"]), None

    def loss(params, batch, key):
        x = patches(batch["x"], params["w"])
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
        return jnp.mean(jnp.tanh(jax.jit(convolve)(x, params["out"])) ** 2)

    def init(key):
        keys = jax.random.split(key, 4)
        draw = jax.random.normal
        layers = {"a": draw(keys[0], (2, 3, 3, 8, 8)) / 9, "b": draw(keys[1], (2, 1, 1, 8, 8)) / 3}
        return {
            "w": draw(keys[2], (4, 4, 4, 8)) / 8,
            "layers": layers,
            "out": draw(keys[3], (1, 1, 8, 8)) / 3,
        }

    assert_gradient_of_one_device(loss, init, batch, "data|fsdp", 3, **ACCUMULATE)
