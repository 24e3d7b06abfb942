"""Programs in which XLA's partitioner loses the order of devices: refused, or reported."""

import ast
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.tree import Leaf
from shardkit.report import PlacedLeaf, read_miscompiled
from shardkit.report.hlo._parts import Parts, held_parts, reshape

RNG = np.random.default_rng(0)
WIDTH = 48
BATCH = {k: RNG.normal(size=(WIDTH, WIDTH)).astype("f") for k in "xy"}
NAMES = ("data", "fsdp", "tensor")


def build_mesh(names):
    sizes: Any = dict.fromkeys(names, 2)
    return sk.MeshSpec(**sizes).build()


def loss(params, batch, key):
    y = batch["x"]
    for name in "abc":
        y = jnp.tanh(y @ params[name])
    return jnp.mean((y - batch["y"]) ** 2)


def init(key):
    return {
        k: jax.random.normal(key, (WIDTH, WIDTH)) / 8
        for k, key in zip("abc", jax.random.split(key, 3), strict=True)
    }


def compiled(rows, weights, names=NAMES, **options):
    axes = dict(zip(NAMES, names, strict=True))
    spec = P(*[axes[axis] for axis in weights])
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=BATCH,
        mesh=build_mesh(names),
        strategy=sk.Strategy(
            params=sk.PathRules({"**": spec}), batch=P(tuple(axes[axis] for axis in rows))
        ),
        **options,
    )


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        (("fsdp", "tensor"), ("data", "fsdp", "tensor")),
        (("tensor", "fsdp"), ("data", "fsdp", "tensor")),
        (("fsdp", "tensor"), ("replica", "zero", "model")),
    ],
)
def test_a_lost_order_of_rows_is_refused_with_an_order_that_is_right(weights, names):
    first, second = names[:2]
    with pytest.raises(sk.errors.StepError) as caught:
        compiled(("data", "fsdp"), weights, names)
    told = str(caught.value)
    right = f"P({(second, first)!r}) in place of P({(first, second)!r})"
    for part in ("f32[12,24]", "4 of 8 devices", right):
        assert part in told
    step = compiled(("fsdp", "data"), weights, names)
    state = step.init(jax.random.key(0))
    want = jax.grad(loss)(jax.device_get(state.params), BATCH, None)
    got = step.gradients(state, BATCH)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def halves(x, w):
    """Two products with halves of a weight, whose columns are split."""
    return jnp.tanh(x @ w[:, :8]) @ w[:, 8:]


def gates(x, w):
    """Halves of an activation, which the partitioner moves along its columns by shifts."""
    up, gate = jnp.split(x @ w, 2, -1)
    return (up * jax.nn.silu(gate)) @ w[:, 8:]


def turns(x, w):
    """A recurrence: its residuals are stacked over the turns."""
    body = lambda i, z: jnp.tanh(z @ w[:, :8] / 4 + x)  # noqa: E731
    return jax.lax.fori_loop(0, 3, body, jnp.zeros_like(x))


def halves_step(loss_of, rows, names=NAMES, **options):
    return sk.compile_step(
        loss_of,
        optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (8, 16)) / 2},
        batch=rows,
        mesh=build_mesh(names),
        strategy=sk.Strategy(
            params=sk.PathRules({"w": P("fsdp", "tensor")}), batch=P(("data", "fsdp"))
        ),
        **options,
    )


def gap_of_gradient(step, model, rows):
    state = step.init(jax.random.key(0))
    w = jax.device_get(state.params["w"])
    want = jax.grad(lambda w: jnp.mean(model(rows, w) ** 2))(w)
    return float(np.abs(step.gradients(state, rows)[1]["w"] - want).max() / np.abs(want).max())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("count", [32, pytest.param(64, marks=SLOW)])
@pytest.mark.parametrize("model", [halves, turns])
def test_micro_batches_are_right_in_any_order_of_rows(model, count):
    """Gradient shards are in the order of axes that XLA gets right, whatever that of the rows."""
    rows = RNG.normal(size=(count, 8)).astype("f")
    step = halves_step(lambda p, rows, key: jnp.mean(model(rows, p["w"]) ** 2), rows, accumulate=4)
    assert gap_of_gradient(step, model, rows) < 1e-4
    assert step.layout.shard_axes == ("fsdp", "data")


@pytest.mark.parametrize("names", [("fsdp", "tensor", "data"), pytest.param(NAMES, marks=SLOW)])
def test_halves_of_an_activation_are_reported_exactly_when_they_are_wrong(names):
    rows = RNG.normal(size=(16, 8)).astype("f")
    loss_of = lambda p, rows, key: jnp.mean(gates(rows, p["w"]) ** 2)  # noqa: E731
    step = halves_step(loss_of, rows, names=names, on_miscompiled="report")
    found = [f for f in step.report().findings if f.kind == "miscompiled"]
    assert bool(found) == (gap_of_gradient(step, gates, rows) > 1e-3)


@pytest.mark.parametrize("model", [halves, pytest.param(turns, marks=SLOW)])
def test_rows_that_a_model_folds_and_unfolds_are_followed(model):
    """Of `[1, 2, 8]` on a device it is not said which dim is split; before and after it is."""
    rows = RNG.normal(size=(16, 8)).astype("f")

    def folded(params, rows, key):
        x = jax.lax.with_sharding_constraint(rows.reshape(4, 4, 8), P(("data", "fsdp")))
        return jnp.mean(model(x, params["w"]) ** 2)

    step = halves_step(folded, rows, on_miscompiled="report")
    found = [f for f in step.report().findings if f.kind == "miscompiled"]
    assert bool(found) == (gap_of_gradient(step, model, rows) > 1e-3)


FILLED_IN_TURN = {
    "rows": (lambda w, x: jax.lax.map(lambda row: jnp.tanh(row @ w), x), 1),
    "elements": (lambda w, x: jax.lax.map(jnp.tanh, (x @ w).reshape(-1)).reshape(-1, 16), 1),
    "micro-batches": (lambda w, x: jax.lax.map(lambda row: jnp.tanh(row @ w), x) @ w.T, 2),
}


@pytest.mark.parametrize("name", ["rows", "micro-batches", pytest.param("elements", marks=SLOW)])
def test_what_a_loop_fills_in_turn_is_no_lost_order(name):
    """Each device fills its own rows, or all of them."""
    model, accumulate = FILLED_IN_TURN[name]
    x, y = RNG.normal(size=(24, 8)).astype("f"), np.arange(24)

    def squares(params, batch, key):
        return jnp.mean((model(params["w"], batch["x"]) - batch["y"][:, None]) ** 2)

    step = sk.compile_step(
        squares,
        optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (8, 16)) / 2},
        batch={"x": x, "y": y},
        mesh=sk.MeshSpec(data=3, tensor=2).build(devices=jax.devices()[:6]),
        strategy=sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data")),
        accumulate=accumulate,
    )
    state = step.init(jax.random.key(0))
    want = jax.grad(lambda p: squares(p, {"x": x, "y": y}, None))(jax.device_get(state.params))["w"]
    got = step.gradients(state, {"x": x, "y": y})[1]["w"]
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


def test_a_miscompiled_step_can_be_kept_as_a_finding():
    step = compiled(("data", "fsdp"), ("fsdp", "tensor"), on_miscompiled="report")
    found = [f for f in step.report().findings if f.kind == "miscompiled"]
    assert found
    assert all("/mul" in f.why for f in found)
    assert all("('fsdp', 'data')" in f.fix for f in found)
    with pytest.raises(sk.errors.BudgetError, match="miscompiled"):
        step.report().check(sk.Budget(findings={"miscompiled": 0}))


def test_a_miscompiled_step_is_right_in_the_order_of_its_finding():
    """The order that the fix names, in place of the declared one."""
    gaps = []
    rows = ("data", "fsdp")
    for _ in range(2):
        step = compiled(rows, ("fsdp", "tensor"), on_miscompiled="report")
        state = step.init(jax.random.key(0))
        want = jax.grad(loss)(jax.device_get(state.params), BATCH, None)
        got = step.gradients(state, BATCH)[1]
        gaps += [max(float(np.abs(got[k] - want[k]).max() / np.abs(want[k]).max()) for k in want)]
        wrong = [f for f in step.report().findings if f.kind == "miscompiled"]
        rows = (
            ast.literal_eval(wrong[0].fix[2 : wrong[0].fix.index(") in place of")]) if wrong else ()
        )
    assert not wrong
    assert gaps[0] > 0.1
    assert gaps[1] < 1e-4


# Products x[m, k] · w[n, k] with the specs of x, w and the result: wrong ones and their neighbours.
PRODUCTS = [
    (("d", "t"), (("f", "d"), None), ("t", ("f", "d"))),
    (("t", "f"), ("d", None), ("f", ("t", "d"))),
    (("d", "f"), ("t", None), ("f", ("d", "t"))),
    (("d", "t"), (None, "f"), (("t", "d"), "f")),
    ((("d", "f"), "t"), ("f", "t"), (("d", "f"), "t")),
    ((("f", "d"), "t"), ("f", "t"), (("f", "d"), "t")),
    ((("d", "f"), "t"), (None, "t"), (("d", "f"), "t")),
    ((("d", "f"), None), ("f", "t"), (("d", "f"), "t")),
]


SIZES = (("d", 2), ("f", 2), ("t", 2))


def product_of(specs):
    """The text of a compiled product, and whether its numbers are wrong."""
    mesh = build_mesh("dft")
    x, w = BATCH["x"], BATCH["y"]
    *placed, result = (NamedSharding(mesh, P(*spec)) for spec in specs)
    program = jax.jit(lambda x, w: x @ w.T, in_shardings=placed, out_shardings=result)
    wrong = np.abs(np.asarray(program(x, w)) - x @ w.T).max() > 1e-3
    return program.lower(x, w).compile().as_text() or "", bool(wrong)


@pytest.mark.parametrize("specs", PRODUCTS)
def test_a_product_is_reported_exactly_when_its_numbers_are_wrong(specs):
    text, wrong = product_of(specs)
    whole = Leaf("x", (WIDTH, WIDTH), np.dtype("float32"))
    leaves = [PlacedLeaf("batch", whole, P(*spec)) for spec in specs]
    assert bool(read_miscompiled(text, leaves[:2], leaves[2:], SIZES)) == wrong


def test_there_are_wrong_and_right_products():
    """Once XLA gets all of them right, the test above shows nothing."""
    assert {product_of(specs)[1] for specs in (PRODUCTS[1], PRODUCTS[-1])} == {True, False}


@pytest.mark.parametrize(
    ("rows", "weight", "is_wrong"),
    [
        (("d", "f"), ("f", "t"), True),
        (("d", "f"), ("t", "f"), True),
        (("d", "f"), ("f", None), False),
        (("f", "d"), ("f", "t"), False),
    ],
)
def test_a_recurrence_is_reported_exactly_when_its_gradients_are_wrong(rows, weight, is_wrong):
    """The second turn of the backward loop meets rows in another order than the first left."""
    mesh, shape, time = build_mesh("dft"), (WIDTH, WIDTH), 4

    def loss(w, x):
        def turn(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h

        return jnp.mean(
            jax.lax.scan(turn, jnp.zeros(x.shape[:1] + shape[1:]), x.swapaxes(0, 1))[1] ** 2
        )

    placed = NamedSharding(mesh, P(*weight)), NamedSharding(mesh, P(rows))
    program = jax.jit(jax.grad(loss), in_shardings=placed, out_shardings=placed[0])
    w, x = BATCH["x"][:WIDTH] / WIDTH, np.stack([BATCH["x"]] * time, 1)
    want = jax.grad(loss)(w, x)
    wrong = np.abs(np.asarray(program(w, x)) - want).max() > 1e-3 * np.abs(want).max()
    text = program.lower(w, x).compile().as_text() or ""
    leaves = [
        PlacedLeaf("batch", Leaf("x", array.shape, array.dtype), sharding.spec)
        for array, sharding in zip((w, x), placed, strict=True)
    ]
    assert (wrong, bool(read_miscompiled(text, leaves, leaves[:1], SIZES))) == (is_wrong, is_wrong)


def test_a_slice_for_each_device_beside_one_of_the_model_is_no_lost_order():
    """The partitioner cuts its parts of a micro-batch under the name of the model's own slice."""
    step = sk.compile_step(
        lambda params, batch, key: jnp.mean(jnp.tanh(batch["x"] @ params["w"]) ** 2),
        optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 8},
        batch=BATCH,
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=sk.Strategy(params=sk.PathRules({"w": P("tensor", None)}), batch=P("data")),
        accumulate=sk.Accumulate(2, "every"),
    )
    state = step.init(jax.random.key(0))
    w = np.asarray(state.params["w"])
    want = jax.grad(lambda w: jnp.mean(jnp.tanh(BATCH["x"] @ w) ** 2))(w)
    got = step.gradients(state, BATCH)[1]["w"]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_patches_whose_rows_are_split_are_no_lost_order():
    """XLA moves the one row of each device through a transpose that it leaves out."""
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("f")

    def patches(params, batch, key):
        x = batch["x"].reshape(4, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, 4, 48)
        return jnp.mean(jnp.tanh(jax.lax.with_sharding_constraint(x, P("d", None, "t")) @ params))

    step = sk.compile_step(
        patches,
        optax.sgd(0.1),
        init=lambda key: jnp.ones((48, 8)),
        batch={"x": images},
        mesh=sk.MeshSpec(d=2, t=4).build(),
        strategy=sk.Strategy(params=sk.PathRules({"**": sk.REPLICATED}), batch=P("d")),
    )
    state = step.init(jax.random.key(0))
    x = images.reshape(4, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(16, 48)
    want = jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w)))(jnp.ones((48, 8)))
    got = step.gradients(state, {"x": images})[1]
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


def test_shares_of_queries_that_are_split_over_other_rows_are_no_lost_order():
    """Which queries the sums of a softmax are of is not known, and 1 / sums must not tell it."""
    x = np.random.default_rng(0).standard_normal((8, 8, 16)).astype("f")

    def attend(params, batch, key):
        q, k, v = (jnp.einsum("bte,ehk->bthk", batch["x"], params[n]) for n in "qkv")
        q = jax.lax.with_sharding_constraint(q, P(None, "d", None, None))
        shares = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        out = jnp.einsum("bhts,bshk->bthk", shares, v)
        return jnp.mean(jnp.tanh(batch["x"] + jnp.einsum("bthk,hke->bte", out, params["o"])) ** 2)

    def init(key):
        shapes = {"q": (16, 2, 8), "k": (16, 2, 8), "v": (16, 2, 8), "o": (2, 8, 16)}
        return {name: jax.random.normal(key, shape) / 4 for name, shape in shapes.items()}

    rules = {"q": P(None, None, "t"), "k": P(None, "t"), "v": P(), "o": P(None, "t")}
    step = sk.StepSpec(
        loss_fn=attend,
        optimizer=optax.sgd(0.1),
        init=init,
        batch={"x": x},
        strategy=sk.Strategy(params=sk.PathRules(rules), batch=P("t")),
    ).compile(sk.MeshSpec(d=4, t=2).build())
    state = step.init(jax.random.key(0))

    def plain(params):
        q, k, v = (jnp.einsum("bte,ehk->bthk", x, params[n]) for n in "qkv")
        shares = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        out = jnp.einsum("bhts,bshk->bthk", shares, v)
        return jnp.mean(jnp.tanh(x + jnp.einsum("bthk,hke->bte", out, params["o"])) ** 2)

    want = jax.grad(plain)(jax.device_get(state.params))
    got = step.gradients(state, {"x": x})[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, want)


def attended(queries, keys):
    shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", queries, keys))
    return jnp.einsum("bhqk,bkhd->bqhd", shares, keys)


def heads(x, width):
    return x.reshape(*x.shape[:2], -1, width)


WITH_HEADS = {
    "grouped queries": lambda p, x: attended(
        heads(x @ p["q"], 4), jnp.repeat(heads(x @ p["kv"], 4), 2, 2)
    ).reshape(*x.shape[:2], 16),
    "one key": lambda p, x: attended(
        heads(x @ p["q"], 8), jnp.repeat(heads(x @ p["kv"], 8), 2, 2)
    ).reshape(*x.shape[:2], 16),
    "mean of heads": lambda p, x: jnp.tile(jnp.tanh(heads(x @ p["q"], 8)).mean(2), 2),
    "largest of heads": lambda p, x: jnp.tile(heads(x @ p["q"], 8).max(2), 2),
    "halves of a weight": lambda p, x: jnp.tile(x @ p["q"].reshape(8, 2, 8).sum(1), 2),
}
HEADS = [*WITH_HEADS][::2], [*WITH_HEADS][1::2]


@pytest.mark.parametrize("name", [*HEADS[0], *(pytest.param(n, marks=SLOW) for n in HEADS[1])])
def test_a_head_on_each_device_that_is_left_out_is_no_lost_order(name):
    """Of `[heads, 8]` with one head on a device a split dim of 8 is left, as a whole key has."""
    x = RNG.normal(size=(24, 6, 8)).astype("f")

    def squares(params, batch, key):
        return jnp.mean((WITH_HEADS[name](params, batch) @ params["o"] - batch) ** 2)

    def init(key):
        shapes = {"q": (8, 16), "kv": (8, 8), "o": (16, 8)}
        return {name: jax.random.normal(key, shape) / 3 for name, shape in shapes.items()}

    rules = {"o": P("tensor", "fsdp"), "**": P("fsdp", "tensor")}
    step = sk.compile_step(
        squares,
        optax.sgd(0.1),
        init=init,
        batch=x,
        mesh=build_mesh(NAMES),
        strategy=sk.Strategy(params=sk.PathRules(rules), batch=P(("data", "fsdp"))),
    )
    state = step.init(jax.random.key(0))
    want = jax.grad(lambda p: squares(p, x, None))(jax.device_get(state.params))
    got = step.gradients(state, x)[1]
    for leaf in want:
        largest = float(np.abs(want[leaf]).max())
        np.testing.assert_allclose(got[leaf], want[leaf], atol=1e-5 * largest)


def test_rows_of_a_gradient_that_are_gathered_in_another_order_are_refused():
    """XLA brings x to (f, t) for the product, and gathers the gradient as if it were (t, f).

    Between the two the program exchanges the dims of x by an all-to-all.
    """
    x = np.random.default_rng(0).standard_normal((4, 4, 16)).astype("f")

    def attend(params, batch, key):
        x = jax.lax.with_sharding_constraint(batch["x"], P(None, "d", ("t", "f")))
        q = jnp.einsum("bte,ehk->bthk", x, params["q"])
        k = x @ params["k"]
        scores = jax.nn.softmax(jnp.einsum("bthk,bsk->bhts", q, k))
        x += jnp.einsum("bthk,hke->bte", jnp.einsum("bhts,bsk->bthk", scores, k), params["o"])
        return jnp.mean(jnp.tanh(x) ** 2)

    def init(key):
        shapes = {"q": (16, 4, 4), "k": (16, 4), "o": (4, 4, 16)}
        return {name: jax.random.normal(key, shape) / 4 for name, shape in shapes.items()}

    rules = {"q": P(None, None, "d"), "k": P("t", ("f", "d")), "o": P()}
    spec = sk.StepSpec(
        loss_fn=attend,
        optimizer=optax.sgd(0.1),
        init=init,
        batch={"x": x},
        strategy=sk.Strategy(params=sk.PathRules(rules), batch=P("f", None, ("t", "d"))),
        on_miscompiled="report",
    )
    mesh = build_mesh("dft")
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0))

    def plain(params):
        q, k = jnp.einsum("bte,ehk->bthk", x, params["q"]), x @ params["k"]
        scores = jax.nn.softmax(jnp.einsum("bthk,bsk->bhts", q, k))
        out = jnp.einsum("bhts,bsk->bthk", scores, k)
        return jnp.mean(jnp.tanh(x + jnp.einsum("bthk,hke->bte", out, params["o"])) ** 2)

    want = jax.grad(plain)(jax.device_get(state.params))["q"]
    gap = np.abs(step.gradients(state, {"x": x})[1]["q"] - want).max() / np.abs(want).max()
    found = [one for one in step.report().findings if one.kind == "miscompiled"]
    assert bool(found) == bool(gap > 1e-3)
    if found:
        with pytest.raises(sk.errors.StepError, match="lost the order of devices"):
            spec.replace(on_miscompiled="error").compile(mesh)


@pytest.mark.parametrize(
    ("source", "target", "starts", "want"),
    [
        ((2, 3, 4), (6, 4), ((0, 2), (0, 0), (0, 4)), ((0, 6), (0, 4))),
        ((6, 4), (2, 3, 4), ((0, 6), (0, 4)), ((0, 2), (0, 0), (0, 4))),
        ((2, 3), (6,), ((0, 0), (0, 3)), (None,)),  # each device holds two runs of six
        ((6,), (2, 3), ((0, 3),), ((0, 1), (0, 0))),
        ((6,), (2, 3), ((0, 2),), (None, None)),
        ((1, 4), (4,), ((0, 1), (0, 0)), (None,)),  # [2, 4] to [8], or its sum over the rows
        ((1, 4), (4,), ((0, 0), (0, 4)), ((0, 4),)),  # every device has the only element
        ((8, 1, 4), (8, 4), ((0, 0), (0, 0), (0, 0)), ((0, 0), (0, 0))),
        ((4, 1), (4,), ((0, 0), (0, 1)), (None,)),
        ((4,), (1, 4), ((0, 4),), (None, None)),  # [8] to [2, 4], or to [1, 8]
        ((2, 4), (2, 1, 4), ((0, 0), (0, 4)), ((0, 0), None, None)),  # [2, 8] to one of these
        ((2, 1, 4), (2, 4), ((0, 0), (0, 1), (0, 0)), (None, None)),  # to [4, 4], or to [2, 8]
        ((4,), (1, 4), ((0, 0),), (None, (0, 0))),
        ((4, 5), (4, 5), (None, (0, 5)), (None, (0, 5))),
    ],
)
def test_a_reshape_keeps_what_is_certain(source, target, starts, want):
    assert reshape(Parts(starts), source, target).dims == want


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        (
            [(2, 4), (1, 2, 4), (2, 4)],
            ((0, 2), (0, 4)),
        ),  # split and merged, or put in and taken out
        ([(2, 4), (1, 2, 4), (1, 1, 2, 4), (2, 4)], ((0, 2), (0, 4))),
        ([(2, 4), (1, 2, 4), (8,)], (None,)),
        ([(1, 2, 4), (1, 1, 2, 4), (2, 4)], (None, None)),  # its rows begin before
    ],
)
def test_dims_that_are_put_in_and_taken_out_change_nothing(sizes, want):
    starts = ((0, 2), (0, 4)) if len(sizes[0]) == 2 else ((0, 1), (0, 0), (0, 4))
    parts = Parts(starts)
    for source, target in itertools.pairwise(sizes):
        parts = reshape(parts, source, target)
    assert parts.dims == want


def test_a_device_holds_the_part_of_its_place_in_the_mesh():
    held = held_parts((8, 6), (("b", "a"), ()), (("a", 2), ("b", 2)))
    assert held.dims == ((0, 4, 2, 6), (0, 0, 0, 0))
