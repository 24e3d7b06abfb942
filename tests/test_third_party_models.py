"""Models in their authors' idiom, on meshes, against plain JAX on one device.

Each model × layout × accumulation × precision × mode is right, or refused where the model says so.
The whole table is slow; a thin slice of it is not.
"""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import optax
import pytest

import shardkit as sk

from ._models_gan import critic_loss, generator_loss
from ._tables import table
from ._third_party import CELLS, Cell, check, compare, layouts, to_host

# Name → module and function. Modules of libraries that are not installed are skipped.
MODELS = {
    "resnet": ("._models_resnet", "build"),
    "linen transformer": ("._models_linen", "build"),
    "gemma": ("._models_gemma", "build"),
    "mamba": ("._models_mamba", "build"),
    "haiku by hand": ("._models_haiku", "build"),
    "haiku mean": ("._models_haiku", "build_mean"),
    "vit": ("._models_vit", "build"),
    "unet ema": ("._models_unet", "build"),
    "gan generator": ("._models_gan", "build"),
    "gan critic": ("._models_gan", "build_critic"),
    "graph network": ("._models_graph", "build"),
    "nnx lora": ("._models_lora", "build"),
    "two towers": ("._models_clip", "build"),
    "equinox attention": ("._models_sequences", "build_equinox"),
    "equinox gru": ("._models_sequences", "build_gru"),
    "equinox ensemble": ("._models_sequences", "build_ensemble"),
    "haiku gru": ("._models_sequences", "build_haiku"),
    "hugging face": ("._models_sequences", "build_hf"),
}
SLICE = (
    ("gan critic", Cell("fsdp", True, "float32", "shard_map"), "right"),
    ("two towers", Cell("tensor", False, "bfloat16", "auto"), "right"),
    ("two towers", Cell("data", True, "float32", "auto"), "dot_general multiplies rows"),
    ("haiku by hand", Cell("data", False, "float32", "shard_map"), "divides by a sum over rows"),
    ("mamba", Cell("tensor", True, "float32", "auto"), "right"),
    # One head of keys on each device: nothing is lost, though dims of one element merge.
    ("gemma", Cell("tensor", False, "float32", "auto"), "right"),
)


@functools.cache
def model(name):
    module, function = MODELS[name]
    return getattr(importlib.import_module(module, __package__), function)()


@pytest.mark.parametrize(("name", "cell"), table(MODELS, CELLS, every=19))
def test_every_cell_is_right_or_refused(name, cell):
    check(model(name), cell)


@pytest.mark.parametrize(
    ("name", "cell", "outcome"), SLICE, ids=[f"{name} {cell}" for name, cell, _ in SLICE]
)
def test_a_slice(name, cell, outcome):
    assert outcome in check(model(name), cell)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_two_steps_of_a_gan_train_one_state_in_turn(layout):
    declared = model("gan generator")
    strategy, sizes = declared.layouts[layout]
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[:4])
    optimizers = {"generator": optax.adam(1e-2), "critic": optax.sgd(0.1)}
    losses = {"critic": critic_loss, "generator": generator_loss}

    def labels(trained):
        return {name: name if name == trained else "frozen" for name in losses}

    def optimizer(trained):
        return optax.multi_transform({**optimizers, "frozen": optax.set_to_zero()}, labels(trained))

    spec = sk.StepSpec(
        loss_fn=critic_loss,
        optimizer=optimizer("critic"),
        init=declared.init,
        batch=declared.batch,
        strategy=strategy,
    )
    steps = {
        name: spec.replace(loss_fn=loss, optimizer=optimizer(name)).compile(mesh)
        for name, loss in losses.items()
    }
    state = steps["critic"].init(jax.random.key(0))
    params = to_host(state.params)
    states = {name: step.init(jax.random.key(0)).opt_state for name, step in steps.items()}
    plain = {name: optimizer(name).init(params) for name in losses}
    for name in ("critic", "generator", "critic", "generator"):
        state = dataclasses.replace(state, opt_state=states[name])
        state, metrics = steps[name](state, declared.batch)
        states[name] = state.opt_state
        value, grads = jax.value_and_grad(losses[name])(params, declared.batch)
        updates, plain[name] = optimizer(name).update(grads, plain[name], params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    compare(Cell(layout, False, "float32", "auto"), "params", to_host(state.params), params)


# The check itself can fail.


def test_other_numbers_and_unexpected_refusals_fail():
    towers, cell = model("two towers"), Cell("data", False, "float32", "auto")

    def scaled(params, state, rows):
        total, weight, after = towers.plain(params, state, rows)
        return 1.001 * total, weight, after

    with pytest.raises(AssertionError, match=r"data float32 auto: loss.* is off by 9\.\de-04"):
        check(dataclasses.replace(towers, plain=scaled), cell)
    with pytest.raises(AssertionError, match="multiplies rows with one another"):
        check(dataclasses.replace(towers, refused=()), dataclasses.replace(cell, accumulates=True))


def test_a_leaf_of_another_size_fails_in_bf16_too():
    cell = Cell("data", False, "bfloat16", "auto")
    leaf = np.linspace(1, 2, 8)
    compare(cell, "leaf", {"w": leaf * 1.05}, {"w": leaf})
    with pytest.raises(AssertionError, match=r"is off by 1\.0e-01"):
        compare(cell, "leaf", {"w": leaf * 1.1}, {"w": leaf})
    assert set(layouts({})) == {"data", "fsdp", "tensor"}
