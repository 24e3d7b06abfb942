"""Arguments of `from_linen`, `from_nnx` and `from_equinox` that cannot work: one error each.

Every row was an exception of Python, JAX or the library from inside of a trace, or a warning.
"""

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import shardkit as sk

equinox = pytest.importorskip("equinox")

X = np.ones((8, 4), np.float32)
OUTSIDE = nnx.Rngs(0)


class Trained(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.Dropout(0.1, deterministic=not train)(linen.Dense(3)(x))


def linen_model(module=None, loss=lambda y, batch: y.mean(), batch=None, **options):
    return sk.from_linen(module or linen.Dense(3), loss, batch or {"x": X}, **options)


def nnx_model(make=lambda rngs: nnx.Linear(4, 3, rngs=rngs), loss=lambda m, b: m(b["x"]).mean()):
    return sk.from_nnx(make, loss)


def equinox_model(
    make=lambda key: equinox.nn.Linear(4, 3, key=key), loss=lambda m, b: jax.vmap(m)(b["x"]).mean()
):
    return sk.from_equinox(make, loss)


MISTAKES = {
    "linen: input that the batch lacks": (
        lambda: linen_model(batch={"tokens": X, "mask": X}),
        ["inputs='x'  'x' is not in the batch, which has tokens, mask", "inputs='tokens'"],
    ),
    "linen: one of several inputs": (
        lambda: linen_model(inputs=("x", "mask")),
        ["inputs=('x', 'mask')  'mask' is not in the batch, which has x"],
    ),
    "linen: batch that is an array": (
        lambda: sk.from_linen(linen.Dense(3), lambda y, batch: y.mean(), X),
        ["inputs='x'  'x' is not in the batch, of type ndarray", 'batch={"x": ...}'],
    ),
    "linen: list": (
        lambda: linen_model(batch={"x": [[1.0, 2.0]]}),
        ["batch/x  is a list of 1 items, which JAX takes as a tree"],
    ),
    "linen: string": (lambda: linen_model(batch={"x": "text"}), ["batch/x  is of type str"]),
    "linen: class": (
        lambda: linen_model(linen.Dense),
        ["module  is the class Dense, not a module of flax.linen", "sk.from_linen(Dense(...)"],
    ),
    "linen: module of nnx": (
        lambda: linen_model(nnx.Linear(4, 3, rngs=OUTSIDE)),
        ["module  is of type Linear, not a module of flax.linen", "sk.from_nnx"],
    ),
    "linen: option that the module lacks": (
        lambda: linen_model(train={"training": True}),
        ["train={'training': True}  Dense is __call__(self, inputs)", "'training'"],
    ),
    "linen: argument that is not given": (
        lambda: linen_model(Trained(), train={"train": True}),
        [
            "evaluate={}  Trained is __call__(self, x, train)",
            "'train'",
            'evaluate={"train": False}',
        ],
    ),
    "linen: loss of the outputs alone": (
        lambda: linen_model(loss=lambda y: y.mean()),
        ["loss  is <lambda>(y), called with 2 arguments", "def loss(outputs, batch)"],
    ),
    "linen: loss and batch swapped": (
        lambda: sk.from_linen(linen.Dense(3), {"x": X}, lambda y, batch: y.mean()),
        ["loss  is of type dict, not a function", "def loss(outputs, batch)"],
    ),
    "nnx: module": (
        lambda: nnx_model(nnx.Linear(4, 3, rngs=OUTSIDE)),
        ["make_model  is a module of class Linear, not a function", "lambda rngs: Net(..., rngs"],
    ),
    "nnx: class with settings": (
        lambda: nnx_model(nnx.Linear),
        ["make_model  is Linear(in_features, out_features, ", "called with 1 argument"],
    ),
    "nnx: function without rngs": (
        lambda: nnx_model(lambda: nnx.Linear(4, 3, rngs=OUTSIDE)),
        ["make_model  is <lambda>(), called with 1 argument"],
    ),
    "nnx: streams from outside": (
        lambda: nnx_model(lambda rngs: nnx.Linear(4, 3, rngs=OUTSIDE)),
        ["make_model  changes a variable from outside, such as another nnx.Rngs"],
    ),
    "nnx: two results": (
        lambda: nnx_model(lambda rngs: (nnx.Linear(4, 3, rngs=rngs), 1)),
        ["make_model  returns a tuple, not an nnx.Module"],
    ),
    "nnx: loss of parameters": (
        lambda: nnx_model(loss=lambda params, batch, key, rate: 0.0),
        ["loss  is <lambda>(params, batch, key, rate), called", "def loss(module, batch)"],
    ),
    "nnx: loss that is a string": (lambda: nnx_model(loss="mse"), ["loss  is of type str, not a"]),
    "equinox: module": (
        lambda: equinox_model(equinox.nn.Linear(4, 3, key=jax.random.key(0))),
        ["make_model  is a module of class Linear, not a function", "lambda key: Net(..., key"],
    ),
    "equinox: class with settings": (
        lambda: equinox_model(equinox.nn.MLP),
        ["make_model  is MLP(in_size, out_size, width_size, depth, ", "called with 1 argument"],
    ),
    "equinox: loss of the module alone": (
        lambda: equinox_model(loss=lambda module: 0.0),
        ["loss  is <lambda>(module), called with 2 arguments", "def loss(module, batch)"],
    ),
    "equinox: loss without the state": (
        lambda: equinox_model(
            lambda key: equinox.nn.make_with_state(equinox.nn.BatchNorm)(4, "batch", mode="batch"),
            lambda module, batch: 0.0,
        ),
        ["called with 3 arguments", "def loss(module, state, batch)"],
    ),
}


@pytest.mark.parametrize("row", MISTAKES)
def test_an_argument_that_cannot_work_is_named(row):
    declare, expected = MISTAKES[row]
    with pytest.raises(sk.errors.StepError) as caught:
        declare()
    text = str(caught.value)
    assert text.startswith("The model is declared wrongly.")
    assert all(part in text for part in expected), text


class Tensor:
    """What NumPy sees of a torch tensor."""

    dtype, shape = "torch.float32", (8, 4)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(X, dtype)


@pytest.mark.parametrize("x", [Tensor(), X.astype(np.float64), jax.ShapeDtypeStruct((8, 4), "f")])
def test_what_a_step_takes_a_linen_model_takes(x):
    model = linen_model(batch={"x": x})
    spec = sk.StepSpec(
        loss_fn=model.loss_fn, init=model.init, optimizer=optax.sgd(0.1), batch={"x": x}
    )
    step = spec.compile(sk.MeshSpec(data=2).build(devices=jax.devices()[:2]))
    _, metrics = step(step.init(jax.random.key(0)), {"x": X})
    kernel = np.asarray(model.init(jax.random.key(0))["kernel"])
    np.testing.assert_allclose(metrics["loss"], (X @ kernel).mean(), rtol=1e-5)
