"""What a pipeline refuses, by the text of its errors."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk

from . import _staged as model

pipeline = sk.strategies.pipeline
DATA = sk.strategies.data()


def message(strategy, layers=4, rows=16, loss=model.loss, **sizes):
    sizes = sizes or {"data": 2, "pipe": 4}
    mesh = sk.MeshSpec(**sizes).build()
    with pytest.raises(sk.errors.StepError) as raised:
        model.step(mesh, strategy, layers, rows, loss=loss)
    return str(raised.value)


def scaled_gates(params, batch, key):
    """A batch that the loss computes from a parameter."""
    return model.loss(params, {**batch, "gate": batch["gate"] * params["scale"][0]}, key)


# What a pipeline computes on parts of the rows, though the loss is a mean of rows.
OF_PARTS = {
    "a maximum": (
        lambda *args: model.loss(*args, last=lambda e, x, b: x.max()),
        "reduce_max reduces over rows",
    ),
    "a batch of parameters": (scaled_gates, "is computed from parameters"),
}


@pytest.mark.parametrize("name", OF_PARTS)
def test_what_a_pipeline_would_compute_from_parts_is_refused(name):
    loss, why = OF_PARTS[name]
    assert why in message(DATA | pipeline(micro_batches=2), loss=loss)


# 16 rows on two devices of rows: 4 of them in each of 2 micro-batches, or one in each of 8.
BY_SIZE = {
    "a power": (2, lambda e, x, b: (x ** (2 if len(x) >= 8 else 3)).mean()),
    "a factor of one row": (8, lambda e, x, b: (x**2).mean() * (1.0 if len(x) > 1 else 0.5)),
    "a squeeze": (
        8,
        lambda e, x, b: jax.vmap(lambda row: row.sum() ** 2)(jnp.squeeze(x[:, None])).mean(),
    ),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_a_stage_is_followed_on_the_rows_of_a_micro_batch(name):
    micro_batches, last = BY_SIZE[name]
    strategy = DATA | pipeline(micro_batches=micro_batches)
    text = message(strategy, loss=lambda *args: model.loss(*args, last=last))
    assert "strategies.pipeline() splits the rows" in text
    assert "test_pipeline_errors.py:" in text


def test_an_evaluation_that_mixes_rows_is_refused():
    def pairs(ends, x, batch):
        return jnp.mean(jnp.einsum("ile,jle->ij", x, x))

    loss = sk.Loss(model.loss, lambda *args: model.loss(*args, last=pairs))
    step = model.step(
        sk.MeshSpec(data=2, pipe=4).build(), DATA | pipeline(micro_batches=2), loss=loss
    )
    with pytest.raises(sk.errors.StepError, match="multiplies rows with one another"):
        step.evaluate(step.init(jax.random.key(0)), model.make_batch())


def test_options_are_refused_together():
    with pytest.raises(sk.errors.StepError) as raised:
        pipeline(schedule="1f1", micro_batches=0, virtual_stages=2, outer_params="splitt")
    text = str(raised.value)
    assert "schedule='1f1'" in text
    assert "Did you mean '1f1b'?" in text
    assert "micro_batches=0" in text
    assert "only the interleaved schedule has virtual stages, at least 2" in text
    assert "Did you mean 'split'?" in text
    with pytest.raises(sk.errors.StepError, match=r"virtual_stages=1 with .interleaved."):
        pipeline(schedule="interleaved", micro_batches=4)


def test_layers_rows_and_groups_are_refused_together():
    strategy = DATA | pipeline(schedule="interleaved", virtual_stages=2, micro_batches=6)
    text = message(strategy, layers=12)
    assert "12 layers do not split evenly into 4 stages of 2 virtual stages" in text
    assert "layers_per_stage=(2, 2, 2, 2, 1, 1, 1, 1), or a model of 8 or 16 layers" in text
    assert "interleaving sends micro-batches in groups of pipe=4" in text
    assert "micro_batches=8" in text
    assert "16 rows do not divide by micro_batches=6 x data=2" in text
    assert "a multiple of 12 rows, such as 12" in text


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ((3, 2, 2), "has 3 entries for 4 stages"),
        ((3, 2, 2, 2), "adds up to 9, the model has 8 layers"),
    ],
)
def test_uneven_stages_must_add_up(declared, why):
    text = message(DATA | pipeline(micro_batches=2, layers_per_stage=declared), layers=8)
    assert why in text
    assert "Fix: layers_per_stage=(2, 2, 2, 2)" in text


def test_uneven_layers_are_never_guessed():
    even = pipeline(micro_batches=2).with_names(params={"layers": None})
    text = message(DATA | even, layers=5)
    assert "5 layers do not split evenly into 4 stages" in text
    assert "layers_per_stage=(2, 1, 1, 1), or a model of 4 or 8 layers" in text


def test_layers_that_stages_do_not_divide_are_refused_with_the_numbers_to_declare():
    with pytest.raises(sk.errors.ShardingError) as raised:
        model.step(sk.MeshSpec(data=2, pipe=4).build(), DATA | pipeline(micro_batches=2), 5)
    text = str(raised.value)
    assert "dim 0 (5) is not divisible by pipe=4" in text
    assert (
        "strategies.pipeline(..., layers_per_stage=(2, 1, 1, 1)).with_names("
        'params={"layers": None}), which stores all layers on every stage; or '
    ) in text


def test_accumulation_inside_the_pipeline_is_its_own():
    both = DATA | pipeline(micro_batches=4) | sk.Strategy(accumulate=2)
    text = message(both)
    assert "accumulate=2" in text
    assert "pipeline(micro_batches=8)" in text
    assert 'sk.Accumulate(2, reduce="every")' in text
    apart = sk.Strategy(precision=sk.Precision(compute_dtype="bfloat16", reduce_dtype="float32"))
    text = message(DATA | pipeline(micro_batches=4) | apart)
    assert "a pipeline reduces its gradients in the compute dtype" in text


def test_rows_are_not_split_over_stages():
    rows = sk.Strategy(batch=P("pipe"))
    text = message(rows | pipeline(micro_batches=2), layers=8, pipe=8)
    assert "mesh axis 'pipe'" in text
    assert "splits the rows of the batch, but every stage needs all of them" in text


def test_integers_do_not_travel():
    def loss(params, batch, key):
        return sk.nn.layer_stack(
            lambda ends, batch, key: (batch["tokens"], ends["table"][batch["tokens"]]),
            lambda w, x, batch, key: x,
            lambda ends, x, batch: x[1].mean(),
            {"table": params["table"]},
            {"up": params["up"]},
            batch,
        )

    text = message(DATA | pipeline(micro_batches=2), loss=loss)
    assert "first(...) returned int32" in text
    assert "first(...) returned int32[4, 4]" in text
    assert "read integers from `batch`" in text


def stack(params, batch, key, layer=model.layer, last=model.last, each=None):
    """The model's loss with another part; `each` gives what every layer has beside its weights."""
    ends = {name: params[name] for name in ("table", "scale")}
    layers = {name: params[name] for name in ("up", "down")}
    layers = layers if each is None else (layers, each)
    return sk.nn.layer_stack(model.first, layer, last, ends, layers, batch, key)


LAYOUTS = {
    "data": (DATA, {"data": 8}),
    "pipeline": (DATA | pipeline(micro_batches=4), {"data": 2, "pipe": 4}),
}
LAYERS = {
    "shape": (lambda w, x, *rest: x[:, 1:], r"returns x f32\[\d+,3,8\] where it takes x f32"),
    "dtype": (lambda w, x, *rest: x.astype("bfloat16"), "returns x bf16.* where it takes x f32"),
    "tree": (lambda w, x, *rest: (x, x), "returns x/0 f32.* where it takes x f32"),
}


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_returns_something_else_is_refused_at_its_line(what, layout):
    (strategy, sizes), (layer, text) = LAYOUTS[layout], LAYERS[what]
    error = message(strategy, loss=lambda *args: stack(*args, layer=layer), **sizes)
    assert re.search(text + r".*\(test_pipeline_errors.py:\d+ in <lambda>\)", error)
    assert "y.astype(x.dtype)" in error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_metric_of_a_stack_in_the_loss_is_refused_and_not_without_gradient(layout):
    def last(ends, x, batch):
        return jnp.mean(x**2), {"size": jnp.abs(x).mean()}

    def loss(params, batch, key):
        value, metrics = stack(params, batch, key, last=last)
        return value + 0.1 * metrics["size"], metrics

    strategy, sizes = LAYOUTS[layout]
    text = message(strategy, loss=loss, **sizes)
    assert "the metrics of sk.nn.layer_stack  are a part of the loss" in text
    assert "a `last` whose loss has this term" in text


def test_keys_among_the_layers_are_refused_at_the_draw():
    def loss(params, batch, key):
        each = jax.random.split(key, 4)
        layer = lambda w, x, batch, _: model.layer(w[0], x, batch, w[1])  # noqa: E731
        return stack(params, batch, None, layer=layer, each=each)

    text = message(DATA | pipeline(micro_batches=4), loss=loss)
    assert "draws from a key that the loss makes itself" in text


def test_keys_that_cannot_be_split_by_rows():
    def loss(params, batch, key):
        return model.loss(params, batch, jax.random.key(0, impl="rbg"))

    text = message(DATA | pipeline(micro_batches=2), loss=loss)
    assert "key of rbg  only draws of partitionable threefry keys can be split by rows" in text
    assert 'jax.random.key(seed, impl="threefry2x32")' in text


def test_a_model_without_stages_is_an_error():
    def loss(params, batch, key):
        return jnp.mean(params["table"] ** 2)

    text = message(DATA | pipeline(micro_batches=2), loss=loss)
    assert (
        "`strategies.pipeline()`  needs `sk.nn.layer_stack`, but the model never calls it" in text
    )
    assert "Fix: sk.nn.layer_stack(...) in the model" in text


def test_a_permute_inside_one_stage_is_refused_before_it_waits_for_ever():
    def layer(weights, x, batch, key):
        return x + sk.nn.constrain(jnp.roll(x, 1, 1), "batch", "length", "embed")

    def loss(params, batch, key):
        ends = {name: params[name] for name in ("table", "scale")}
        layers = {name: params[name] for name in ("up", "down")}
        return sk.nn.layer_stack(model.first, layer, model.last, ends, layers, batch)

    names = sk.AxisRules(dict(length="seq", batch=None, embed=None, mlp=None))
    split = sk.Strategy(
        params=sk.REPLICATED, activations=names, kinds=sk.strategies.own("seq").kinds
    )
    text = message(pipeline(micro_batches=2) | split, loss=loss, pipe=2, seq=4)
    assert "A pipeline stage would deadlock on mesh (pipe=2, seq=4)." in text
    assert "layers: jit(_roll_static)/" in text
    assert "moves f32[8,1,8] over 'seq' by a permute, inside one pipeline stage" in text
    assert 'y = sk.nn.constrain(y, "batch", None, ...)' in text


def test_parameters_that_a_function_closes_over_are_refused_at_their_line():
    table = jnp.arange(3.0)

    def loss(params, batch, key):
        positions = jnp.cos(table)  # depends on no parameter, so it may be closed over

        def layer(weights, x, batch, key):
            return jnp.tanh(x @ weights) * params["scale"] + positions.sum()

        return sk.nn.layer_stack(
            lambda outer, batch, key: batch @ outer,
            layer,
            lambda outer, x, batch: jnp.mean(x**2) * jnp.sum(params["first"]),
            params["first"],
            params["layers"],
            batch,
        )

    def init(key):
        return {
            "first": sk.WithAxes(jnp.ones((4, 4)), (None, None)),
            "layers": sk.WithAxes(jnp.ones((4, 4, 4)), ("layers", None, None)),
            "scale": sk.WithAxes(jnp.ones(4), (None,)),
        }

    with pytest.raises(sk.errors.StepError) as raised:
        sk.compile_step(
            loss,
            optax.sgd(0.1),
            init=init,
            batch=jnp.ones((16, 4)),
            mesh=sk.MeshSpec(data=2, pipe=4).build(),
            strategy=DATA | pipeline(micro_batches=4),
        )
    text = str(raised.value)
    assert (
        "layer f32[4]   closes over an array that depends on the parameters, or on what jax.vmap"
        in text
    )
    assert "last f32[4,4]" in text
    assert '`return jnp.tanh(x @ weights) * params["scale"] + positions.sum()`' in text
    assert "test_pipeline_errors.py:" in text
    assert "f32[3]" not in text
