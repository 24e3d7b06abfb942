"""The parity report is right, reads well, and fails if something is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardkit import (
    Accumulate,
    Loss,
    Mean,
    MeshSpec,
    PathRules,
    StepSpec,
    Strategy,
    Variables,
    compile_step,
    strategies,
)
from shardkit._core.io._table import narrow_texts
from shardkit.errors import VerificationError
from shardkit.parity import (
    ParityReport,
    ParityRow,
    build_one_device_mesh,
    make_random_batches,
    verify,
)
from shardkit.parity._compare import (
    ErrorLimits,
    compare_with_reference,
    compute_errors,
    find_unequal_leaves,
    find_worst_leaf,
)
from shardkit.parity._layout import find_differing_copies, find_misplaced_leaves
from shardkit.parity._nudges import nudge_grads, nudge_params
from shardkit.parity._observe import Observation, count_compiles
from shardkit.parity._record import ParityInputs, clipped_sgd
from shardkit.parity._reference import Reference

ROWS, WIDTH = 8, 4
STRATEGY = Strategy(
    params=PathRules({"up": P(None, "tensor"), "down": P("tensor", None), "bias": P()}),
    batch=P("data"),
)


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, 8)),
        "down": jax.random.normal(down, (8, WIDTH)),
        "bias": jnp.zeros(WIDTH),
    }


def loss_fn(params, batch, key):
    h = jax.nn.relu(batch["x"] @ params["up"])
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h, 0)
    y = h @ params["down"] + params["bias"]
    weight = batch["w"].sum()
    total = jnp.sum(batch["w"] * jnp.mean((y - batch["x"]) ** 2, axis=-1))
    return Mean(total, weight), {"size": Mean(jnp.sum(batch["w"] * h.mean(-1)), weight)}


def batches(n=2):
    rng = np.random.default_rng(0)
    w = np.array([0, 0, 0, 0, 1, 1, 0, 1], np.float32)
    return [{"x": rng.standard_normal((ROWS, WIDTH), np.float32), "w": w} for _ in range(n)]


def factory(mesh, **options):
    options = {"loss_fn": loss_fn, "init": init, "strategy": STRATEGY, **options}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    loss = options.pop("loss_fn")
    return compile_step(loss, optimizer, batch=batches(1)[0], mesh=mesh, **options)


@pytest.fixture(scope="module")
def report():
    return verify(factory, [MeshSpec(data=2, tensor=4)], batches=batches())


def test_every_check_of_a_right_step_passes(report):
    assert report.check() is report
    assert [row.check for row in report.rows] == [
        "layout",
        "init",
        "loss",
        "gradients",
        "grad_norm",
        "metrics",
        "sgd update",
        "k-step loss",
        "k-step metrics",
        "k-step state",
        "evaluate",
        "k-step evaluate",
        "counters",
        "copies",
        "compiles once",
    ]


def test_thresholds_come_from_noise_and_end_at_1e_5_in_f32(report):
    rows = {row.check: row for row in report.rows}
    assert 0 < rows["gradients"].noise < 1e-5
    for check in ("loss", "gradients", "grad_norm", "metrics", "sgd update", "evaluate"):
        assert rows[check].threshold <= 1.01e-5
    assert rows["init"].threshold == rows["layout"].threshold == 0


def test_table_names_the_worst_leaf_within_a_hundred_columns(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("One device against each mesh: 3 steps, compute f32.")
    assert "(data=2, tensor=4)" in text
    assert "noise  threshold" in text
    assert text.endswith("15 of 15 checks passed: every mesh equals one device.")


def test_a_narrow_terminal_folds_the_table(report):
    with narrow_texts(60):
        narrow = str(report)
    assert max(map(len, narrow.splitlines())) <= 60
    assert sorted("".join(narrow.split())) == sorted("".join(str(report).split()))  # none is cut


def test_a_loss_that_depends_on_the_mesh_fails_with_every_row():
    def broken(mesh):
        def wrong(params, batch, key):
            mean, metrics = loss_fn(params, batch, key)
            return Mean(mean.total * mesh.size, mean.weight), metrics

        return factory(mesh, loss_fn=wrong)

    found = verify(broken, [MeshSpec(data=2, tensor=1)], batches=batches(), steps=2)
    assert not found.ok
    assert {"loss", "gradients", "grad_norm", "evaluate"} <= {r.check for r in found.failed}
    assert "NOT equal to one device" in str(found)
    with pytest.raises(VerificationError) as raised:
        found.check()
    message = str(raised.value)
    assert "checks failed on 1 of 1 meshes." in message
    assert "(data=2, tensor=1) loss" in message
    assert "loss is off by 1.0e+00; at most" in message
    assert "between correct runs" in message
    assert "Fix:" in message
    assert "step.gradients(state, batch)[1]" in message
    assert "likely: the loss is summed 2 times, once on each device of (data=2)" in message


def test_the_reference_is_plain_jax():
    one = factory(build_one_device_mesh(MeshSpec(data=2, tensor=4).build()))
    reference = Reference(one.spec, jax.devices()[0])
    start = reference.init(jax.random.key(3))
    metrics, grads, _ = reference.gradients(start, batches()[0], 5)
    wanted_params = jax.jit(init)(jax.random.key(3))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, start.params, wanted_params)))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2**32 - 2), 5)

    def mean(params):
        out, _ = loss_fn(params, batches()[0], key)
        return out.total / out.weight

    loss, wanted = jax.value_and_grad(mean)(start.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, wanted)


def test_micro_batches_of_the_reference_make_one_weighted_mean():
    def quiet(params, batch, key):
        out = batch["w"] * jnp.mean((batch["x"] @ params["up"]) ** 2, -1)
        return Mean(out.sum(), batch["w"].sum())

    one = factory(
        build_one_device_mesh(MeshSpec(data=1, tensor=1).build(devices=jax.devices()[:1])),
        loss_fn=quiet,
    )
    d = one.spec
    split = d.replace(accumulate=4)
    told = []
    for spec in (d, split):
        reference = Reference(spec, jax.devices()[0])
        told.append(reference.gradients(reference.init(jax.random.key(0)), batches()[0], 0))
    (whole, whole_grads, _), (parts, parts_grads, _) = told
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-6)
    np.testing.assert_allclose(whole_grads["up"], parts_grads["up"], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_bf16_accumulation_and_model_state():
    def counted(params, batch, key, model_state):
        mean, metrics = loss_fn(params, batch, key)
        return mean, metrics, {"mean": 0.9 * model_state["mean"] + batch["x"].mean(0)}

    stateful = Loss(counted, counted, stateful=True)
    found = verify(
        functools.partial(
            factory,
            loss_fn=stateful,
            init=lambda key: Variables(init(key), {"mean": jnp.zeros(WIDTH)}),
            accumulate=Accumulate(2, reduce="every"),
            precision="bfloat16",
        ),
        [MeshSpec(data=2, tensor=2)],
        batches=batches(),
        steps=2,
    ).check()
    rows = {row.check: row for row in found.rows}
    assert "compute bf16, 2 micro-batches" in found.title
    assert rows["gradients"].noise < rows["gradients"].threshold <= 0.25


def centred(extra=0.0):
    """Features whose mean over the rows is taken off, as BatchNorm does: `bias` has no gradient."""

    def loss_fn(params, batch, key):
        hidden = batch["x"] @ params["up"] + params["bias"]
        hidden = hidden - hidden.mean(0)
        out = jax.nn.relu(hidden / jnp.sqrt(hidden.var(0) + 1e-5)) @ params["down"]
        return jnp.mean((out - batch["y"]) ** 2) + extra * params["bias"].sum()

    def init(key):
        up, down = jax.random.split(key)
        return {
            "up": jax.random.normal(up, (8, 32)),
            "down": jax.random.normal(down, (32, 4)),
            "bias": jnp.zeros(32),
        }

    rng = np.random.default_rng(0)
    return StepSpec(
        loss_fn=loss_fn,
        optimizer=optax.adam(1e-2),
        init=init,
        batch={"x": rng.normal(size=(16, 8)).astype("f"), "y": np.ones((16, 4), "f")},
        strategy=strategies.data(),
    )


@pytest.mark.slow
def test_a_gradient_that_is_zero_up_to_rounding_is_held_to_its_own_noise():
    verify(centred(), [MeshSpec(data=4)]).check()

    def factory(mesh):
        return centred(0.0 if mesh.size == 1 else 1e-4).compile(mesh)

    wrong = verify(factory, [MeshSpec(data=4)])
    failed = {row.check: row for row in wrong.rows if not row.ok}
    assert failed["gradients"].leaf == "bias"


def test_nothing_to_verify_is_one_error():
    with pytest.raises(VerificationError) as raised:
        verify(factory, [], batches=[], steps=0)
    message = str(raised.value)
    assert all(part in message for part in ("meshes", "batches", "steps=0", "must be at least 1"))


def test_a_loss_that_is_not_finite_names_the_fix():
    bad = [{**batches()[0], "x": np.full((ROWS, WIDTH), np.inf, np.float32)}]
    with pytest.raises(VerificationError, match=r"loss nan.*a comparison proves nothing") as raised:
        verify(factory, [MeshSpec(data=1, tensor=1)], batches=bad, steps=1)
    assert "Fix: verify(..., batches=[...])" in str(raised.value)


def test_sums_of_random_floats_are_exact_in_any_order():
    """Of weights near a sum of zero, devices and one device made sums that differed by more."""
    step = factory(build_one_device_mesh(MeshSpec(data=2, tensor=4).build()))
    for made in make_random_batches(step):
        flat = made["x"].ravel()
        assert np.cumsum(flat)[-1] == np.cumsum(flat[::-1])[-1] == flat.astype("f8").sum()


def test_random_batches_have_the_declared_shapes():
    step = factory(build_one_device_mesh(MeshSpec(data=2, tensor=4).build()))
    first, second = make_random_batches(step)
    assert first["x"].shape == (ROWS, WIDTH)
    assert first["x"].dtype == np.float32
    assert not np.array_equal(first["x"], second["x"])


# The parts of the checks, each shown to fail.


def test_errors_are_normwise_with_a_floor():
    wanted = {"large": np.array([100.0, 1.0]), "zero": np.array([0.0])}
    found = {"large": np.array([100.0, 2.0]), "zero": np.array([0.5])}
    assert compute_errors(found, wanted) == {"large": 0.01, "zero": 0.5}
    assert find_worst_leaf(found, wanted) == ("zero", 0.5)


@pytest.mark.parametrize(
    "found",
    [{}, {"w": np.ones(3)}, {"w": np.array([1.0, np.nan])}, {"w": np.ones(2), "v": np.ones(1)}],
)
def test_missing_misshapen_and_undefined_leaves_are_infinitely_wrong(found):
    assert max(compute_errors(found, {"w": np.ones(2)}).values()) == np.inf


def test_bits_count_where_values_do_not():
    assert find_unequal_leaves({"w": np.array([-0.0])}, {"w": np.array([0.0])}) == ["w"]
    assert find_unequal_leaves({"w": np.array([0.0])}, {"w": np.array([0.0])}) == []


def test_limits_of_each_dtype():
    f32, bf16 = ErrorLimits.of("float32"), ErrorLimits.of("bfloat16")
    assert f32.threshold("gradients", 1.0) == pytest.approx(1e-5, rel=0.01)
    assert f32.threshold("gradients", 0.0) == pytest.approx(9.5e-7, rel=0.01)
    assert f32.threshold("gradients", 5e-7) == pytest.approx(4e-6)
    assert f32.threshold("k-step state", 1e-3) == pytest.approx(8e-3)
    assert bf16.threshold("gradients", 1.0) == 0.25
    # A metric may be zero up to rounding, but noise alone is no reason to let it be anything.
    assert f32.threshold("metrics", 5e-3) == pytest.approx(1e-5, rel=0.01)
    assert f32.threshold("metrics", 2e-2) == pytest.approx(0.16)
    assert bf16.threshold("metrics", 0.2) == 0.25
    assert bf16.threshold("metrics", 2.0) == 16
    assert bf16.threshold("metrics", np.inf) <= 0.25
    # So may a gradient; what Adam makes of it is as large as any other update.
    assert f32.threshold("gradients", 1e-4, vanishing=True) == pytest.approx(8e-4)
    assert f32.threshold("gradients", 1.0, vanishing=True) == 0.25
    assert f32.threshold("k-step state", 1.0, vanishing=True) == 8
    assert f32.threshold("k-step state", np.inf, vanishing=True) == 0.25


def test_a_leaf_without_a_scale_does_not_widen_the_thresholds_of_the_others():
    def record(w, bias):
        return {"init": {}, "gradients": {"w": np.array([w]), "bias": np.array([bias])}}

    reference, nudged = record(1.0, 1e-5), record(1 + 2e-7, -1e-5)
    limits = ErrorLimits.of("float32")

    def gradients(w, bias):
        observed = Observation(record(w, bias), (), (), later_calls=0, later_compiles=0)
        rows = compare_with_reference("mesh", observed, reference, [nudged], limits)
        return next((row.leaf, row.ok) for row in rows if row.check == "gradients")

    assert gradients(1.0, 3e-5) == ("bias", True)
    assert gradients(1.0, 3e-4) == ("bias", False)
    assert gradients(1 + 4e-6, 3e-5) == ("w", False)


def test_a_layout_other_than_the_declared_one_is_found():
    mesh = MeshSpec(data=2, tensor=4).build()
    x = jax.device_put(jnp.zeros((8, 4)), jax.NamedSharding(mesh, P("tensor")))
    assert list(find_misplaced_leaves({"x": x}, {"x": P("tensor")}, mesh, "at first")) == []
    ((leaf, why),) = find_misplaced_leaves({"x": x}, {"x": P("data")}, mesh, "at first")
    assert leaf == "x"
    assert why == "at first is laid out as P('tensor'), the rules say P('data')"


def test_copies_that_differ_are_found():
    mesh = MeshSpec(data=8).build()
    apart = jax.shard_map(
        lambda x: x[0], mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False
    )(jnp.arange(8.0))
    ((leaf, why),) = find_differing_copies({"same": jnp.ones(2), "apart": apart})
    assert leaf == "apart"
    assert why == "devices 0 and 1 hold copies 1.0e+00 apart"


def test_compiles_are_counted():
    with count_compiles() as count:
        jax.jit(lambda x: x * 3)(np.float32(2))
    assert count[0] > 0
    with count_compiles() as count:
        pass
    assert count[0] == 0


def test_sgd_is_clipped_and_moves_by_a_tenth():
    params, grads = {"w": np.full(4, 5.0, np.float32)}, {"w": np.full(4, 2.0, np.float32)}
    sgd = clipped_sgd(params, grads)
    update, _ = sgd.update(grads, sgd.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(update["w"]), 1.0, rtol=1e-5)
    double, _ = sgd.update({"w": 2 * grads["w"]}, sgd.init(params), params)
    np.testing.assert_allclose(update["w"], double["w"], rtol=1e-5)


def test_a_nudge_is_one_rounding():
    params = {"up": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}
    moved = nudge_params(params, "float32", 0)
    assert 0 < np.abs(moved["up"] / params["up"] - 1).max() <= 2.5e-7
    assert np.array_equal(moved["bias"], params["bias"])


def test_a_gradient_is_nudged_by_a_rounding_of_its_sum():
    """What is small may be a difference of large parts; what is zero stays zero."""
    grads = {"w": np.array([1.0, -1.0, 1e-3, 0.0], "f")}
    moved = nudge_grads("bfloat16", 0)(grads)["w"] - grads["w"]
    eps = float(jnp.finfo("bfloat16").eps)
    np.testing.assert_allclose(np.abs(moved[:2]), eps, rtol=1e-3)
    assert 0.5 * eps < np.abs(moved[2]) < eps
    assert moved[3] == 0


def test_batches_of_a_trial_take_turns():
    trial = ParityInputs(["a", "b"], 3, jax.random.key(0))
    assert [trial.batch(t) for t in range(3)] == ["a", "b", "a"]


def test_a_certificate_without_rows_proves_nothing():
    assert not ParityReport((), "nothing").ok
    assert not ParityRow("m", "loss", "loss", float("nan"), 0.0, 1.0).ok
