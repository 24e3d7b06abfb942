"""Mistakes of a first day: each is one error that names the argument and what to write, or works.

Every row of the tables was an exception of Python or JAX from inside of a trace, or an error with a
line per number of a list.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

X = np.arange(32, dtype=np.float32).reshape(8, 4) / 32
KEY = jax.random.key(0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 8, rngs=rngs)


MASKED = np.ma.masked_array(X, X > 0.5)
RECORDS = np.zeros(8, [("a", "f4")])


class HostTensor:
    """What NumPy sees of a torch tensor: the array protocol, and a dtype that is not NumPy's."""

    dtype, shape = "torch.float32", (8, 4)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(X, dtype)


class DeviceTensor(HostTensor):
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")


def init(key):
    return {"w": jnp.ones((4, 8))}


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def spec(**changes):
    fields = {
        "loss_fn": loss_fn,
        "optimizer": optax.sgd(0.1),
        "init": init,
        "batch": {"x": X},
        "strategy": sk.Strategy(batch=P("data")),
    }
    return sk.StepSpec(**{**fields, **changes})


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


@pytest.fixture(scope="module")
def step(mesh):
    return spec().compile(mesh)


def text_of(kind, call, *args):
    with pytest.raises(kind) as caught:
        call(*args)
    return str(caught.value)


DECLARED = {
    "loss without a key": (
        {"loss_fn": lambda params, batch: jnp.mean(batch["x"] @ params["w"])},
        ["loss_fn  is <lambda>(params, batch), called with 3 arguments", "(params, batch, key)"],
    ),
    "stateful loss without state": (
        {"loss_fn": sk.Loss(loss_fn, loss_fn, stateful=True)},
        ["loss_fn.train", "loss_fn.evaluate", "called with 4 arguments", "key, model_state)"],
    ),
    "init without a key": (
        {"init": lambda: {"w": jnp.ones((4, 8))}},
        ["init  is <lambda>(), called with 1 argument", "def init(key)"],
    ),
    "nnx class": (
        {"init": Net},
        ["init  is the class Net", "sk.from_nnx(lambda rngs: Net(rngs=rngs), loss)"],
    ),
    "linen class": (
        {"init": linen.Dense},
        ["init  is the class Dense", "sk.from_linen(Net(...), loss", "init=model.init"],
    ),
    "linen module": ({"init": linen.Dense(8)}, ["a module of class Dense", "sk.from_linen"]),
    "linen init": ({"init": linen.Dense(8).init}, ["a method of a module of", "sk.from_linen"]),
    "any class": ({"init": dict}, ["init  is the class dict", "def init(key)"]),
    "typed keys": (
        {"batch": {"x": X, "k": jax.random.split(KEY, 8)}},
        ["batch/k  is key<fry>[8], typed keys", "jax.random.wrap_key_data"],
    ),
    "string": ({"batch": {"x": X, "s": "hello"}}, ["batch/s  is of type str, not an array"]),
    "strings": (
        {"batch": {"x": X, "s": np.array(["a"] * 8)}},
        ["batch/s  is an array of <U1, not an array of numbers", "token ids"],
    ),
    "objects": (
        {"batch": {"s": np.array([object()] * 8)}},
        ["batch/s  is an array of object, not an array of numbers"],
    ),
    "tensor on a device": (
        {"batch": {"x": DeviceTensor()}},
        ["batch/x  is of type DeviceTensor, which NumPy cannot read", "cuda:0", ".cpu().numpy()"],
    ),
    "long list": (
        {"batch": {"x": [[1.0] * 100] * 100}},
        ["batch/x  is a list of 100 items", "numpy.asarray"],
    ),
    "masked array": ({"batch": {"x": MASKED}}, ["batch/x  is a masked array", "x.filled(0)"]),
    "records": ({"batch": {"x": RECORDS}}, ["batch/x  is an array of [('a', '<f4')], not an"]),
    "longer numbers than JAX has": (
        {"batch": {"x": X.astype(np.longdouble)}},
        [f"batch/x  is an array of {np.dtype(np.longdouble)}, not an array of numbers"],
    ),
    "function in place of a batch": (
        {"batch": lambda i: {"x": X}},
        ["batch  is of type function, not a batch", "next(iter(...)), or a call"],
    ),
    "data set in place of a batch": (
        {"batch": ({"x": X} for _ in range(3))},
        ["batch  is of type generator, not a batch", "one batch of it: next(iter(...))"],
    ),
    "optimizers": ({"optimizer": [optax.sgd(0.1)]}, ["optimizer  is of type list", "optax.chain("]),
    "optimizers by name": (
        {"optimizer": {"w": optax.sgd(0.1)}},
        ["optimizer  is of type dict", "optax.multi_transform("],
    ),
    "strategy by its name": (
        {"strategy": "fsdp"},
        ["strategy  is of type str", "sk.strategies.fsdp(), called"],
    ),
    "predicate without a path": (
        {"trainable": lambda: True},
        ["trainable  is <lambda>(), called with 1 argument", "def trainable(path): ..."],
    ),
}


@pytest.mark.parametrize("row", DECLARED)
def test_a_declaration_names_the_argument(row):
    changes, expected = DECLARED[row]
    text = text_of(sk.errors.StepError, lambda: spec(**changes))
    assert all(part in text for part in expected), text
    assert len(text.splitlines()) <= 4, text


def test_functions_that_can_be_called_are_not_refused():
    def keyless(params, batch):
        return loss_fn(params, batch, None)

    @functools.wraps(keyless)
    def wrapped(params, batch, key):
        return keyless(params, batch)

    class Callable:
        def __call__(self, params, batch, key):
            return loss_fn(params, batch, key)

        def method(self, params, batch, key):
            return loss_fn(params, batch, key)

    for function in (
        wrapped,
        Callable(),
        Callable().method,
        jax.jit(loss_fn),
        functools.partial(loss_fn),
        lambda *args: loss_fn(*args),
        lambda params, batch, key, extra=0: loss_fn(params, batch, key),
    ):
        spec(loss_fn=function)
    spec(init=jax.jit(init))


def equinox_mlp(key):
    equinox = pytest.importorskip("equinox")
    return {"mlp": equinox.nn.MLP(4, 4, 8, 1, key=key)}


def only_updates(grads, state, params=None):
    return grads


def growing(grads, state, params=None):
    return grads, (1.0,)


COMPILED = {
    "matrix as lists": (
        {"init": lambda key: {"w": [[1.0] * 8] * 4}},
        ["params/w  is a list of 4 items, which JAX takes as a tree", "asarray"],
    ),
    "tensor": (
        {"init": lambda key: {"w": HostTensor()}},
        ["params/w  is of type HostTensor, not an array of numbers", "jnp.asarray(...) of it"],
    ),
    "no batch": ({"batch": None}, ["batch  is None, without a leaf; the loss raises TypeError"]),
    "empty batch": ({"batch": {}}, ["batch  is {}, without a leaf; the loss raises KeyError: 'x'"]),
    "three results": (
        {"loss_fn": lambda params, batch, key: (loss_fn(params, batch, key), {}, {})},
        ["loss_fn  returned (f32[], dict, dict); expected loss, or (loss, metrics dict)"],
    ),
    "optimizer of other parameters": (
        {"optimizer": optax.lookahead(optax.sgd(0.1), 5, 0.5)},
        ["optimizer (lookahead)  cannot be updated: 'dict' object has no attribute 'fast'"],
    ),
    "state that grows": (
        {"optimizer": optax.GradientTransformation(lambda params: (), growing)},
        ["state/opt_state/0  is absent before, f32[] after"],
    ),
    "function": (
        {"init": lambda key: {**init(key), "act": jax.nn.relu}},
        ["params/act  is the function relu, not an array of numbers", "leave it out of the tree"],
    ),
    "string": (
        {"init": lambda key: {**init(key), "name": "mlp"}},
        ["params/name  is the string 'mlp', not an array of numbers"],
    ),
    "function in the state": (
        {"init": lambda key: sk.Variables(init(key), {"act": jax.nn.relu})},
        ["model_state/act  is the function relu"],
    ),
    "equinox": (
        {"init": equinox_mlp},
        ["params/mlp/activation  ", "is the function relu", "sk.from_equinox(lambda key: "],
    ),
    "nothing": ({"init": lambda key: {}}, ["params  is {}, without a leaf", "def init(key)"]),
    "updates alone": (
        {"optimizer": optax.GradientTransformation(lambda params: (), only_updates)},
        ["optimizer  returns a dict, not a pair", "return updates, state"],
    ),
    "mask of another tree": (
        {"optimizer": optax.masked(optax.sgd(0.1), {"v": True})},
        [
            "optimizer (masked)  cannot be initialised: pytree structure error",
            "like the parameters",
        ],
    ),
    "label of no optimizer": (
        {"optimizer": optax.multi_transform({"a": optax.sgd(0.1)}, {"w": "b"})},
        ["optimizer (partition)  cannot be initialised: Some parameters have no"],
    ),
    "string in the optimizer": (
        {"optimizer": optax.GradientTransformation(lambda params: {"name": "me"}, only_updates)},
        ["opt_state/name  is of type str, not an array", "jnp.asarray"],
    ),
    "metric without a name": (
        {"loss_fn": lambda params, batch, key: (loss_fn(params, batch, key), {1: 1.0})},
        ["metrics[1]  is named by int", "{name: scalar}"],
    ),
}


@pytest.mark.parametrize("row", COMPILED)
def test_what_the_functions_return_is_named(mesh, row):
    changes, expected = COMPILED[row]
    text = text_of(sk.errors.StepError, spec(**changes).compile, mesh)
    assert all(part in text for part in expected), text


def test_a_variable_with_a_sharding_in_place_of_names(mesh):
    class Placed(nnx.Module):
        def __init__(self, rngs):
            where = jax.NamedSharding(mesh, P(None, "tensor"))
            self.w = nnx.Param(jnp.ones((4, 8)), out_sharding=where)

    model = sk.from_nnx(Placed, lambda module, batch: jnp.mean(batch["x"] @ module.w[...]))
    wrong = spec(init=model.init, loss_fn=model.loss_fn)
    text = text_of(sk.errors.ShardingError, wrong.compile, mesh)
    assert "w  has a NamedSharding on devices" in text
    assert 'nnx.Param(x, out_sharding=("embed", "mlp"))' in text


def test_names_as_one_text(mesh):
    named = spec(init=lambda key: {"w": sk.WithAxes(jnp.ones((4, 8)), "ab")})
    text = text_of(sk.errors.ShardingError, named.compile, mesh)
    assert "params/w  is named by the text 'ab', not by a tuple of names" in text


def test_rules_as_pairs():
    text = text_of(sk.errors.ShardingError, lambda: sk.AxisRules([("mlp", "tensor")]))
    assert "AxisRules.table  expected mapping" in text
    assert "Fix: table=dict(...) of these pairs" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("embd", "mlp"), ["list logical axis 'embd'", "rename({'embed': 'embd'})"]),
        (("tensor", "mlp"), ["list logical axis 'tensor'.\n", "with_names(params={'tensor': None"]),
    ],
)
def test_a_name_that_a_ready_strategy_does_not_list(mesh, names, expected):
    named = spec(
        init=lambda key: {"w": sk.WithAxes(jnp.ones((4, 8)), names)},
        strategy=sk.strategies.data() | sk.strategies.tensor(),
    )
    text = text_of(sk.errors.ShardingError, named.compile, mesh)
    assert all(part in text for part in expected), text
    assert "AxisRules({" not in text


CALLED = {
    "typed keys": (jax.random.split(KEY, 8), ["batch/x  is key<fry>[8], typed keys"]),
    "string": ("hello", ["batch/x  is of type str, not an array of numbers"]),
    "strings": (np.array(["a"] * 8), ["batch/x  is an array of <U1, not an array"]),
    "objects": (np.array([object()] * 8), ["batch/x  is an array of object"]),
    "object": (object(), ["batch/x  is of type object, not an array of numbers"]),
    "tensor on a device": (DeviceTensor(), ["which NumPy cannot read", ".cpu().numpy()"]),
    "long list": ([[1.0] * 100] * 100, ["batch/x  is a list of 100 items", "numpy.asarray"]),
    "masked array": (MASKED, ["batch/x  is a masked array", "numpy.ma.getmaskarray(x)"]),
    "records": (RECORDS, ["batch/x  is an array of [('a', '<f4')], not an array of numbers"]),
    "shape": (jax.ShapeDtypeStruct((8, 4), "f"), ["batch/x  is the shape f32[8,4] alone"]),
}


@pytest.mark.parametrize("call", ["__call__", "evaluate", "gradients", "shard_batch"])
def test_a_generator_in_place_of_a_batch(step, call):
    batches = ({"x": X} for _ in range(3))
    arguments = [batches] if call == "shard_batch" else [step.init(KEY), batches]
    text = text_of(sk.errors.BatchError, getattr(step, call), *arguments)
    assert "batch  is of type generator, not a batch" in text
    assert "one batch of it: next(iter(...))" in text


@pytest.mark.parametrize("row", CALLED)
@pytest.mark.parametrize("call", ["__call__", "evaluate", "gradients", "shard_batch"])
def test_a_batch_that_is_not_numbers(step, row, call):
    value, expected = CALLED[row]
    arguments = [{"x": value}] if call == "shard_batch" else [step.init(KEY), {"x": value}]
    text = text_of(sk.errors.BatchError, getattr(step, call), *arguments)
    assert all(part in text for part in expected), text
    assert len(text.splitlines()) <= 5, text


TRACED = {
    "jit": lambda step, state: jax.jit(step)(state, {"x": X}),
    "compile": lambda step, state: jax.jit(lambda x: spec().compile(step.mesh))(X),
    "verify": lambda step, state: jax.jit(lambda x: sk.verify(spec(), meshes=[step.mesh]))(X),
    "jit of the batch": lambda step, state: jax.jit(lambda b: step(state, b))({"x": X}),
    "jit without arguments": lambda step, state: jax.jit(lambda: step(state, {"x": X}))(),
    "vmap": lambda step, state: jax.vmap(lambda b: step(state, b))({"x": X[None]}),
    "scan": lambda step, state: jax.lax.scan(step, state, {"x": X[None]}),
    "evaluate": lambda step, state: jax.jit(step.evaluate)(state, {"x": X}),
    "gradients": lambda step, state: jax.jit(step.gradients)(state, {"x": X}),
    "init": lambda step, state: jax.jit(step.init)(KEY),
    "shard_batch": lambda step, state: jax.jit(step.shard_batch)({"x": X}),
}


@pytest.mark.parametrize("row", TRACED)
def test_a_step_inside_of_a_transformation(step, row):
    text = text_of(sk.errors.StepError, TRACED[row], step, step.init(KEY))
    assert "A step cannot be called inside of a transformation of JAX." in text
    assert "outside of jit, grad, vmap and scan" in text


@pytest.mark.parametrize("call", ["__call__", "evaluate", "gradients", "self_check"])
def test_swapped_arguments(step, call):
    state = step.init(KEY)
    text = text_of(sk.errors.StateError, getattr(step, call), {"x": X}, state)
    assert "state  is of type dict, not a train state; the batch is one: are they swapped?" in text
    assert "step(state, batch)" in text
    text = text_of(sk.errors.StateError, getattr(step, call), state.params, {"x": X})
    assert "state  is of type dict, not a train state\n" in text


def expected_w(w, x):
    """One update of `loss_fn` by SGD, in plain NumPy."""
    product = x @ w
    return w - 0.1 * 2 * x.T @ product / product.size


def trained_w(mesh, given=None, **changes):
    step = spec(**changes).compile(mesh)
    return np.asarray(step(step.init(KEY), given or {"x": X})[0].params["w"], np.float32)


def test_a_tensor_of_the_host_is_its_array(mesh):
    w = trained_w(mesh, {"x": HostTensor()}, batch={"x": HostTensor()})
    np.testing.assert_allclose(w, expected_w(np.ones((4, 8)), X), rtol=1e-6)


def test_fewer_names_than_dims_leave_the_others_without_a_name(mesh):
    named = spec(
        init=lambda key: {"w": sk.WithAxes(jnp.ones((4, 8)), ("embed",))},
        strategy=sk.Strategy(params=sk.AxisRules({"embed": "tensor"}), batch=P("data")),
    ).compile(mesh)
    assert named.shardings.params["w"].spec == P("tensor")
    state, _ = named(named.init(KEY), {"x": X})
    np.testing.assert_allclose(
        np.asarray(state.params["w"]), expected_w(np.ones((4, 8)), X), rtol=1e-6
    )


@pytest.mark.parametrize("given", [jnp.bfloat16, np.dtype("bfloat16")])
def test_a_dtype_is_the_policy_of_its_name(given):
    assert spec(precision=given).precision == spec(precision="bfloat16").precision
    own = sk.Precision(compute_dtype=given, reduce_dtype=jnp.float32)
    assert own == sk.Precision(compute_dtype="bfloat16", reduce_dtype="float32")


def test_a_dtype_that_is_no_policy():
    text = text_of(sk.errors.StepError, lambda: spec(precision=jnp.int32))
    assert "precision='int32'  unknown policy; known: float32, bfloat16" in text


def test_a_mask_over_all_parameters_beside_frozen_ones(mesh):
    def two(key):
        return {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}

    masked = functools.partial(optax.masked, optax.sgd(0.1))
    w = trained_w(mesh, init=two, optimizer=masked({"w": True, "b": False}), trainable="w")
    np.testing.assert_allclose(w, expected_w(np.ones((4, 8)), X), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda step: sk.Loss(3, loss_fn), "loss_fn.train  is of type int, not a function of"),
        (lambda step: sk.lora(init, loss_fn, "w"), "ranks  is of type str"),
        (lambda step: step.save(3), "path  is 3, of type int: a path is a text."),
        (lambda step: step.save(b"x"), "path  is b'x', of type bytes: a path is a text."),
        (lambda step: build("cpu"), "devices  is of type str, not a list of devices"),
        (lambda step: build([0, 1]), "devices[0]  is of type int, not a device"),
        (lambda step: build([jax.devices()[3]] * 2), "devices[1]  is cpu:3, as devices[0] is"),
    ],
)
def test_arguments_of_another_type(step, call, expected):
    def run():
        made = call(step)
        return spec(loss_fn=made) if isinstance(made, sk.Loss) else made

    text = text_of(sk.ShardkitError, run)
    assert expected in text
    assert "Fix:" in text


def build(devices):
    return sk.MeshSpec(data=2).build(devices=devices)
