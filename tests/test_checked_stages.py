"""What a pipeline's stages may do with rows: against one device, by hand, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk

from ._quick import some_quick

ROWS = 8
DATA, pipeline = sk.strategies.data(), sk.strategies.pipeline
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype("f")
BATCH = {"x": X, "y": RNG.integers(0, 4, ROWS).astype("i")}
PARAMS = {
    "w": RNG.normal(size=(4, 4)).astype("f") / 2,
    "layers": RNG.normal(size=(4, 4, 4)).astype("f") / 2,
}
TABLE = jnp.asarray(RNG.random(ROWS).astype("f"))


def init(key):
    return {
        "w": sk.WithAxes(jnp.asarray(PARAMS["w"]), ("embed", None)),
        "layers": sk.WithAxes(jnp.asarray(PARAMS["layers"]), ("layers", None, None)),
    }


def stack(last, *, before=lambda batch: batch, after=lambda out, batch: out):
    """A loss around a layer stack, of `last(x, batch of the stage, whole batch)`."""

    def loss(params, batch, key):
        out = sk.nn.layer_stack(
            lambda outer, rows, key: rows["x"] @ outer,
            lambda w, x, rows, key: x + jnp.tanh(x @ w),
            lambda outer, x, rows: last(x, rows, batch),
            params["w"],
            params["layers"],
            before(batch),
        )
        return after(out, batch)

    return loss


def squares(x):
    return jnp.mean(x**2, -1)


def total(x, rows, batch):
    return jnp.sum(squares(x))


def mean(x, rows, batch):
    return jnp.mean(squares(x))


def with_metrics(x, rows, batch):
    weight = jnp.sum(rows["y"]).astype("f")
    metrics = {
        "sum": jnp.sum(squares(x)),
        "mean": jnp.mean(squares(x)),
        "rows": jnp.float32(len(x)),
        "weighted": sk.Mean(jnp.sum(squares(x) * rows["y"]), weight),
        "mean of means": sk.Mean(jnp.mean(squares(x)), 2.0),
        "weights": sk.Mean(weight, 1.0),
    }
    return jnp.mean(x), metrics


RIGHT = {
    "mean": stack(mean),
    "sum": stack(total),
    "sum, divided by all rows": stack(lambda x, rows, batch: jnp.sum(squares(x)) / len(batch["y"])),
    "sum, divided later": stack(total, after=lambda out, batch: out / len(batch["x"])),
    "mean, divided": stack(lambda x, rows, batch: jnp.mean(squares(x)) / len(x)),
    "Mean of means": stack(
        lambda x, rows, batch: sk.Mean(jnp.mean(squares(x) * rows["y"]), jnp.mean(rows["y"] * 1.0))
    ),
    "Mean of a sum": stack(lambda x, rows, batch: sk.Mean(jnp.sum(squares(x)), 8.0)),
    "Mean, used later": stack(
        lambda x, rows, batch: sk.Mean(jnp.mean(squares(x)), 1.0),
        after=lambda out, batch: out.total + jnp.sqrt(out.weight),
    ),
    "weight of the whole batch": stack(
        lambda x, rows, batch: jnp.sum(squares(x) * rows["y"]) / jnp.sum(batch["y"])
    ),
    "metrics": stack(with_metrics),
    "root of a mean": stack(mean, after=lambda out, batch: jnp.sqrt(out)),
    "beside a maximum": stack(mean, after=lambda out, batch: out * jnp.max(batch["x"])),
    "rows that are mixed before": stack(
        mean, before=lambda b: {"x": jnp.roll(b["x"] - b["x"].mean(0), 1, 0)}
    ),
    "two views": stack(mean, before=lambda b: {"x": jnp.concatenate([b["x"], b["x"] ** 2])}),
    "a number of the batch": stack(
        lambda x, rows, batch: jnp.mean(squares(x)) * rows["n"],
        before=lambda b: {**b, "n": jnp.max(b["x"])},
    ),
}
LAYOUTS = {
    "two rows": ({"data": 2, "pipe": 2}, 2, {}),
    "one row": ({"data": 1, "pipe": 2}, 8, {}),
    "every": ({"data": 2, "pipe": 2}, 2, {"accumulate": sk.Accumulate(2, "every")}),
}
# What accumulation splits as well, around the pipeline.
WHOLE = {
    "root of a mean",
    "beside a maximum",
    "rows that are mixed before",
    "a number of the batch",
}
WHOLE |= {"sum, divided by all rows", "weight of the whole batch", "Mean, used later"}


def compiled(loss, layout="two rows"):
    sizes, micro_batches, options = LAYOUTS[layout]
    devices = jax.devices()[: sizes["data"] * sizes["pipe"]]
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=BATCH,
        mesh=sk.MeshSpec(**sizes).build(devices=devices),
        strategy=DATA | pipeline(micro_batches=micro_batches),
        **options,
    )


def plain(loss, params):
    """The loss and its metrics on one device."""
    out = loss(params, jax.tree.map(jnp.asarray, BATCH), None)
    out, metrics = out if isinstance(out, tuple) else (out, {})
    numbers = {"loss": out, **metrics}
    values = {k: m.total / m.weight if isinstance(m, sk.Mean) else m for k, m in numbers.items()}
    return values["loss"], values


CELLS = [
    (name, layout) for layout in LAYOUTS for name in RIGHT if layout != "every" or name not in WHOLE
]


@pytest.mark.parametrize(
    ("name", "layout"),
    some_quick(
        CELLS,
        *(("sum", "two rows"), ("metrics", "two rows"), ("Mean of means", "one row")),
        slow=CELLS[::2],
    ),
)
def test_what_stages_return_is_that_of_all_rows(name, layout):
    step = compiled(RIGHT[name], layout)
    state = step.init(jax.random.key(0))
    metrics, got = step.gradients(state, BATCH)
    (_, values), want = jax.value_and_grad(lambda p: plain(RIGHT[name], p), has_aux=True)(PARAMS)
    evaluated = step.evaluate(state, BATCH)
    for key, value in values.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5)
        np.testing.assert_allclose(evaluated[key], value, rtol=1e-5)
    for key in PARAMS:
        unit = np.abs(want[key]).max()
        np.testing.assert_allclose(got[key] / unit, want[key] / unit, rtol=1e-5, atol=1e-6)


REFUSED = {
    "a table as rows": (
        stack(
            lambda x, rows, batch: jnp.mean(squares(x) * rows["table"][rows["y"]]),
            before=lambda b: {**b, "table": TABLE},
        ),
        "gather picks rows of the batch by an index (test_checked_stages.py:",
    ),
    "the sum of a table as rows": (
        stack(
            lambda x, rows, batch: jnp.mean(squares(x)) * jnp.sum(rows["table"]),
            before=lambda b: {**b, "table": TABLE},
        ),
        "mul multiplies two sums over rows (test_checked_stages.py:",
    ),
    "a shorter table": (
        stack(
            lambda x, rows, batch: jnp.mean(squares(x) * rows["table"][rows["y"]]),
            before=lambda b: {**b, "table": TABLE[:4]},
        ),
        "batch/table f32[4]  has another size on dim 0 than 8 rows",
    ),
    "rows of the whole batch": (
        stack(lambda x, rows, batch: jnp.mean(squares(x) * batch["y"])),
        "no array of rows closed over; or the same before or after sk.nn.layer_stack",
    ),
    "two views against one another": (
        stack(
            lambda x, rows, batch: jnp.mean((x[: len(x) // 2] - x[len(x) // 2 :]) ** 2),
            before=lambda b: {"x": jnp.concatenate([b["x"], b["x"] ** 2])},
        ),
        "slice takes some rows of the batch and leaves others (test_checked_stages.py:",
    ),
    "statistics of a micro-batch": (
        stack(lambda x, rows, batch: jnp.mean((x - x.mean(0)) ** 2)),
        "the same before or after sk.nn.layer_stack, where all rows are together",
    ),
    "a number by the rows": (
        stack(lambda x, rows, batch: jnp.mean(squares(x)) * (1.0 if len(x) >= 4 else 0.5)),
        ("that depends on their number", "does one thing with one row"),
    ),
    "a metric": (
        stack(lambda x, rows, batch: (jnp.mean(x), {"largest": jnp.max(x)})),
        "metrics['largest']  reduce_max reduces over rows",
    ),
}


@pytest.mark.parametrize("layout", some_quick(["two rows", "one row"], "two rows"))
@pytest.mark.parametrize("name", REFUSED)
def test_what_stages_would_compute_from_parts_is_refused(name, layout):
    loss, why = REFUSED[name]
    with pytest.raises(sk.errors.StepError) as told:
        compiled(loss, layout)
    text = str(told.value)
    assert any(reason in text for reason in ([why] if isinstance(why, str) else why))
    assert "strategies.pipeline() splits" in text or "one value" in text or "scaled" in text
