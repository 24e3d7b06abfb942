"""A step proves its gradient on its own mesh; each check is seen failing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.tracing import equations
from shardkit.run._config import parse_check
from shardkit.step.self_check._gradient import Direction, GradientTest, Limits, choose_direction

from ._quick import some_quick
from ._self_checked import (
    BY_NAME,
    batch,
    compiled,
    dropout_loss,
    init,
    masked_by_hand,
    mean_loss,
    self_checked,
    verdicts,
)

SPLIT_ROWS = sk.Strategy(params=sk.REPLICATED, batch=P(("data", "tensor")))


@pytest.fixture(scope="module")
def plain():
    return compiled()


@pytest.fixture(scope="module")
def result(plain):
    return self_checked(plain)


def test_a_right_step_passes_within_six_evaluations(result):
    assert result.ok
    assert result.check() is result
    assert result.worst_leaf == ""
    assert [check.name for check in result.checks] == [
        "loss", "rows", "gradient", "grad_norm", "copies", "update",
    ]  # fmt: skip
    assert {check.verdict for check in result.checks} == {"ok"}
    assert result.evaluations <= 6
    assert result["gradient"].gap < result["gradient"].threshold <= 0.05
    assert 0 < result.compile_seconds < result.seconds
    assert max(map(len, str(result).splitlines()[:-1])) <= 100
    assert str(result).endswith(result.line)


def test_it_is_deterministic_compiles_once_and_leaves_the_state(plain):
    state = plain.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    first, second = (plain.self_check(state, batch()) for _ in range(2))
    assert [c.gap for c in first.checks] == [c.gap for c in second.checks]
    assert second.compile_seconds == 0
    jax.tree.map(np.testing.assert_array_equal, before, state.params)
    after, _ = plain(state, batch())  # nothing of it was consumed
    other = plain.self_check(after, batch())
    assert other.ok
    assert other["gradient"].gap != first["gradient"].gap


def _square_products(order):
    """Two square products over data x fsdp x tensor, whose partitioning goes wrong on CPU."""
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(64, 64)).astype("f") for name in ("x", "y")}

    def init(key):
        keys = dict(zip("ab", jax.random.split(key), strict=True))
        return {
            name: sk.WithAxes(jax.random.normal(key, (64, 64)) / 8, ("embed", "mlp"))
            for name, key in keys.items()
        }

    def loss(p, b, key):
        return jnp.mean((jnp.tanh(jnp.tanh(b["x"] @ p["a"]) @ p["b"]) - b["y"]) ** 2)

    strategy = getattr(sk.strategies, order[0])()
    for kind in order[1:]:
        strategy |= getattr(sk.strategies, kind)()
    mesh = sk.MeshSpec(data=2, fsdp=2, tensor=2).build()
    options = {"init": init, "batch": given, "mesh": mesh, "strategy": strategy}
    return sk.compile_step(loss, optax.sgd(0.1), **options), given, loss


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (_square_products, ("data", "fsdp", "tensor")),
        pytest.param(_square_products, ("fsdp", "data", "tensor"), marks=pytest.mark.slow),
    ],
    ids=["data-fsdp-tensor", "fsdp-data-tensor"],
)
def test_it_says_what_one_device_says_of_the_partitioner(make, order):
    """XLA on CPU computes the first gradient wrongly; where it does, we say so."""
    step, given, loss = make(order)
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    compiled_gradient = np.asarray(step.gradients(state, given)[1]["a"])
    true = jax.grad(lambda p: loss(p, given, None))(params)["a"]
    off = float(np.abs(compiled_gradient - true).max() / np.abs(true).max())
    result = step.self_check(state, given)
    assert result.ok == (off < 1e-4), f"{off}\n{result}"
    if not result.ok:
        assert result["gradient"].gap > 0.1
        assert result.worst_leaf.startswith("params/a f32")


INJECTED = {
    "gradient doubled": (("gradient",), ""),
    "leaf zeroed": (("gradient",), "params/up f32[4,8]"),
    "norm of a shard": (("grad_norm",), ""),
    "update made twice": (("update",), "params/"),
}


@pytest.mark.parametrize("name", INJECTED)
def test_a_bug_fails_its_check(name):
    failing, leaf = INJECTED[name]
    with BY_NAME[name].apply():
        result = self_checked(compiled())
    assert verdicts(result) == failing
    assert result.worst_leaf.startswith(leaf)


def test_copies_that_differ_are_found():
    with BY_NAME["psum dropped"].apply():
        result = self_checked(compiled(accumulate=2))
    assert verdicts(result) == ("gradient", "copies")
    assert result["copies"].leaf == "gradients/down"
    assert result["gradient"].leaf == "params/down f32[8,4]"


def test_a_mean_that_depends_on_the_split_is_found():
    result = self_checked(compiled(masked_by_hand, accumulate=2, independent_rows=True))
    assert "rows" in verdicts(result)
    with pytest.raises(sk.errors.VerificationError, match=r"sk\.Mean\(total, weight\)"):
        result.check()


def test_the_loss_itself_is_compared_where_rows_cannot_be():
    with BY_NAME["mean of means"].apply():
        result = self_checked(compiled(dropout_loss, accumulate=2, independent_rows=True))
    assert "loss" in verdicts(result)
    assert result["rows"].verdict == "not checked"
    assert "draws random numbers" in result["rows"].why


def test_the_error_names_leaf_numbers_and_fix():
    with BY_NAME["leaf zeroed"].apply():
        result = self_checked(compiled())
    with pytest.raises(sk.errors.VerificationError) as raised:
        result.check()
    message = str(raised.value)
    assert "mesh (data=2, tensor=2)" in message
    assert "params/up f32[4,8]" in message
    assert f"{result['gradient'].gap:.1e}" in message
    assert "Fix:" in message


@pytest.mark.parametrize(
    "options",
    [
        {"loss_fn": dropout_loss, "accumulate": 2},
        {"loss_fn": dropout_loss, "mode": "shard_map", "accumulate": 2, "strategy": SPLIT_ROWS},
        pytest.param(
            {"loss_fn": dropout_loss, "accumulate": sk.Accumulate(2, "every")},
            marks=pytest.mark.slow,
        ),
        {"precision": "bfloat16"},
        {"precision": "pure_bfloat16"},
    ],
    ids=["dropout", "shard_map", "every", "bf16", "pure bf16"],
)
def test_right_steps_of_other_forms_pass(options):
    step = compiled(**options)
    result = self_checked(step, updates=1)
    assert result.ok, f"{result}"
    assert result["gradient"].verdict == "ok"


def test_a_loss_that_is_not_finite_is_left_to_what_the_step_declares(plain):
    broken = {**batch(), "x": np.full((16, 4), np.nan, np.float32)}
    result = plain.self_check(plain.init(jax.random.key(0)), broken)
    assert result.ok
    assert "loss is nan" in result["gradient"].why
    assert "nan" not in result.line


def test_model_state_and_any_pytree():
    def train(params, batch, key, model_state):
        mean = mean_loss(dict(zip(("up", "scale", "down"), params, strict=True)), batch, key)
        return mean, {}, {"seen": model_state["seen"] + 1}

    def listed(key):
        params = init(key)
        return sk.Variables(
            [params["up"], params["scale"], params["down"]], {"seen": jnp.zeros(())}
        )

    loss = sk.Loss(train, train, stateful=True)
    result = self_checked(compiled(loss, init=listed, strategy=SPLIT_ROWS))
    assert result.ok
    assert result["rows"].verdict == "not checked"


def _test_of(loss, gradient, params):
    """A `GradientTest` of plain numbers: every leaf is one element."""
    n, rng = len(params), np.random.default_rng(0)

    def measure(seeds):
        signs = np.where(seeds % 2, 1.0, -1.0)
        return np.stack([np.abs(params), np.abs(gradient), gradient * signs])

    direction = choose_direction(measure, rng, n)
    signs = np.where(direction.seeds % 2, 1.0, -1.0)
    return GradientTest(
        direction,
        lambda amounts: float(loss(params + signs * amounts)),
        lambda amounts: 2 * amounts * signs * gradient,
        Limits.of("float32", "float32", lossy=False),
        abs(float(loss(params))),
    )


@pytest.mark.parametrize("wrong", [None, 0, 3, 6])
def test_bisection_names_the_leaf(wrong):
    params = np.linspace(0.5, 2, 7)
    gradient = np.cos(params)
    if wrong is not None:
        gradient[wrong] *= 1.2
    test = _test_of(lambda p: np.sum(np.sin(p)) + 3, gradient, params)
    check, step = test.run()
    assert check.verdict == ("ok" if wrong is None else "FAILED")
    if wrong is not None:
        leaf, gap = test.worst_leaf(step, check.threshold)
        assert leaf == wrong
        assert gap == pytest.approx(0.2 / 1.2, rel=0.01)


def test_a_rough_loss_is_too_noisy_and_not_wrong():
    params = np.linspace(0.5, 2, 7)
    rough = lambda p: np.sum(np.sin(p)) + 3 + np.sin(1e6 * np.sum(p))  # noqa: E731
    check, _ = _test_of(rough, np.cos(params), params).run()
    assert check.verdict == "too noisy"


@pytest.mark.parametrize(
    ("size", "wrong", "verdict"),
    [(1.0, 1.0, "too noisy"), (1.0, 3.0, "FAILED"), (0.05, 1.2, "FAILED"), (0.0, 1.0, "ok")],
)
def test_corners_of_a_loss_excuse_what_they_add_and_no_more(size, wrong, verdict):
    """Beyond a corner that is nearer than any step, another row is the hardest of its batch."""
    params, near = np.linspace(0.5, 2, 7), 1e-5

    def loss(p):
        return np.sum(np.sin(p)) + 3 + size * max(0.0, np.sum(p - params) - near)

    check, _ = _test_of(loss, wrong * np.cos(params), params).run()
    assert check.verdict == verdict


def test_small_leaves_and_leaves_of_zeros_have_their_part():
    params, gradient = np.array([1.0, 1.0, 1.0, 0.0]), np.array([100.0, 1.0, 0.5, 1.0])
    test = _test_of(lambda p: float(np.sum(p * gradient)), gradient, params)
    parts = np.abs(test.direction.amounts) * gradient
    assert parts.max() / parts.min() < 25
    assert (parts > 0).all()
    assert isinstance(test.direction, Direction)


@pytest.mark.parametrize(("text", "every"), [("off", 0), ("first", float("inf")), ("every 20", 20)])
def test_the_config_says_when(text, every):
    assert parse_check(text) == every
    assert sk.TrainConfig(check=text).check == text


@pytest.mark.parametrize("text", ["always", "every", "every 0", "every -1", "20"])
def test_other_texts_are_refused(text):
    with pytest.raises(sk.errors.ConfigError, match="every N"):
        sk.TrainConfig(check=text)


def _run(step, folder, check, capsys):
    config = sk.TrainConfig(steps=4, check=check, checkpoint_every=0)
    try:
        sk.Trainer(step, lambda i: batch(), folder=folder, config=config).run()
    finally:
        lines = " ".join(capsys.readouterr().out.split())
    return lines


@pytest.mark.parametrize(("check", "steps"), [("off", []), ("first", [1]), ("every 2", [1, 3])])
def test_a_run_checks_itself(plain, tmp_path, capsys, check, steps):
    lines = _run(plain, tmp_path / "run", check, capsys)
    assert [n for n in range(1, 5) if f"self check before step {n} ok" in lines] == steps
    assert ("evaluations in" in lines) == bool(steps)


def test_a_failed_check_ends_a_run_before_its_first_update(tmp_path, capsys):
    with BY_NAME["leaf zeroed"].apply():
        step = compiled()
        with pytest.raises(sk.errors.VerificationError, match="params/up"):
            _run(step, tmp_path / "run", "first", capsys)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert not any('"kind": "step"' in row for row in rows)
    assert any('"kind": "check"' in row and '"leaf": "params/up' in row for row in rows)


# What each mutation fails, without randomness and with dropout after one update, both ×2.
SEEN = {
    "gradient doubled": (("gradient",), ("gradient",)),
    "leaf zeroed": (("gradient",), ("gradient",)),
    "psum dropped": (("gradient", "copies"), ("gradient", "copies")),
    "weights ignored": (("rows", "gradient"), ("loss", "gradient")),
    "mean of means": (("rows", "gradient"), ("loss", "gradient")),
    "micro-batch skipped": (("rows", "gradient"), ("loss", "gradient")),
    "norm of a shard": (("grad_norm",), ("grad_norm",)),
    "key not folded": ((), ("loss", "gradient")),
    "one mask": ((), ("loss", "gradient")),
    "moments replicated": ((), ()),
    "wrong spec": ((), ()),
    "update made twice": (("update",), ("update",)),
    "init by device count": ((), ()),
    "half an evaluation": ((), ()),
    "evaluation shrunk": ((), ()),
    "later metrics doubled": ((), ()),
    "later norms doubled": ((), ("update",)),
    "updates not counted": ((), ()),
    "compiles again": ((), ()),
}
# Of each outcome some.
NOTICED = ("gradient doubled", "psum dropped", "wrong spec", "mean of means", "half an evaluation")


@pytest.mark.parametrize("name", some_quick(BY_NAME, slow=NOTICED))
def test_which_mutations_it_sees(name):
    found = []
    for loss, updates in ((mean_loss, 0), (dropout_loss, 1)):
        with BY_NAME[name].apply():
            found.append(
                verdicts(self_checked(compiled(loss, accumulate=2, independent_rows=True), updates))
            )
    assert tuple(found) == SEEN[name]


def test_leaves_of_one_type_are_one_piece_of_a_probe():
    """100 unstacked layers would else be compiled leaf by leaf, for minutes."""

    def equations_of(layers):
        def init(key):
            return {f"layer{i}": {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)} for i in range(layers)}

        def loss(params, batch, key):
            return jnp.mean(sum(batch @ p["w"] + p["b"] for p in params.values()) ** 2)

        step = sk.compile_step(
            loss,
            optax.sgd(0.1),
            init=init,
            batch=np.ones((8, 4), np.float32),
            mesh=sk.MeshSpec(data=2).build(devices=jax.devices()[:2]),
            strategy=sk.strategies.data(),
        )
        step.self_check(step.init(jax.random.key(0)), np.ones((8, 4), np.float32)).check()
        params, probes = step.abstract_state.params, step._variants.declared.probes
        seeds = jax.ShapeDtypeStruct((2 * layers,), "uint32")
        traced = jax.make_jaxpr(probes.measure.__wrapped__)(params, params, seeds)
        return [eqn.primitive.name for eqn in equations(traced.jaxpr)]

    few, many = equations_of(2), equations_of(6)
    assert few.count("xor") == many.count("xor") > 0
    assert few.count("sqrt") == many.count("sqrt") > 0
