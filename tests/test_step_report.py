"""What the report of a step says about its declaration: names, unused rules, moments."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

import shardkit as sk
from shardkit.report import Report

ROWS, EMBED, MLP = 256, 32, 64
TABLE = sk.PathRules({"up": P(None, "fsdp"), "u*": P("fsdp"), "gate": P()}, allow_unmatched=True)
NAMES = sk.AxisRules({"embed": "fsdp", "mlp": None, "mpl": None, "vocab": "tensor"})


def init(key):
    return {
        "up": sk.WithAxes(jax.random.normal(key, (EMBED, MLP)), ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(key, (MLP, EMBED)), ("mlp", "embed")),
    }


def loss(params, batch, key):
    hidden = sk.nn.constrain(jnp.tanh(batch["x"] @ params["up"]), "batch", "mlp")
    return jnp.mean((hidden @ params["down"]) ** 2)


def reported(optimizer):
    strategy = sk.Strategy(
        params=sk.first_match(TABLE, NAMES),
        batch=P("fsdp"),
        activations=sk.AxisRules({"batch": "fsdp", "mlp": None, "btach": "fsdp", "heads": None}),
        kinds=sk.strategies.fsdp().kinds,
    )
    return sk.compile_step(
        loss,
        optimizer,
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        mesh=sk.MeshSpec(fsdp=8).build(),
        strategy=strategy,
        owners=False,
    ).report()


@pytest.fixture(scope="module")
def report():
    return reported(contrib.muon(0.1))


def test_rules_that_do_nothing_are_findings(report):
    said = [finding.why for finding in report.findings if finding.kind == "unused_rule"]
    assert said == [
        'params: PathRules["u*"] decides none of 1 leaf it matches: PathRules["up"] comes first',
        'params: PathRules["gate"] matches nothing',
        "params: AxisRules['mpl' → None] matches nothing. Did you mean 'mlp'?",
        "activations: AxisRules['btach' → 'fsdp'] matches nothing. Did you mean 'batch'?",
    ]


def test_parameters_keep_their_names(report):
    names = {leaf.path: leaf.names for leaf in report.leaves if leaf.part == "params"}
    assert names == {"up": ("embed", "mlp"), "down": ("mlp", "embed")}


def test_moments_have_their_parameters_names(report):
    state = [leaf for leaf in report.leaves if leaf.part == "opt_state" and len(leaf.shape) == 2]
    names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    assert state
    assert all(leaf.names == names[leaf.path.rpartition("/")[2]] for leaf in state)


def test_the_optimizers_own_products_reduce_no_gradient(report):
    (found,) = [f for f in report.findings if f.kind == "optimizer_collective"]
    own = [row for row in report.ledger if row.by_optimizer and row.payload_bytes > 1024]
    assert {row.phase for row in own} == {"update"}
    assert {row.kind for row in own} == {"all-gather", "all-reduce"}
    assert found.bytes == sum(row.wire_bytes for row in own) > 0
    assert found.axes == ("fsdp",)
    assert "the optimizer multiplies or sums over dims that fsdp splits" in found.why
    assert report.reductions == {"fsdp": 1.0}
    kinds = {finding.kind for finding in report.findings}
    assert not kinds & {"reduction_in_loop", "parameter_gather", "unexplained_collective"}
    (least,) = report.minima
    others = sum(row.wire_bytes for row in report.ledger if not row.by_optimizer)
    assert least.wire == others < report.ledger.total()
    assert "optimizer" in str(report)


def test_an_element_wise_optimizer_sends_none_of_it(report):
    (found,) = [f for f in report.findings if f.kind == "optimizer_collective"]
    assert found.fix.startswith("an element-wise optimizer (optax.adamw), which sends none of it")
    after = reported(optax.adamw(0.1))
    assert "optimizer_collective" not in {finding.kind for finding in after.findings}
    assert after.ledger.total() < report.ledger.total() - 0.9 * found.bytes


def test_the_optimizers_products_are_no_model_flops(report):
    assert report.flops.model == 5 * 2 * ROWS * EMBED * MLP  # the input needs no gradient
    assert report.flops.update > 0
    assert report.flops.total == report.flops.model + report.flops.update
    assert f"{report.flops.update:.4g} by the optimizer" in str(report)


def test_what_goes_beyond_the_minimum_is_explained():
    """Products that share their input have their gradients reduced apart by XLA's CPU compiler."""
    layers, rows, length, embed, mlp = 3, 8, 16, 32, 64
    shape = {"layers": layers, "embed": embed, "mlp": mlp}

    def init(key):
        def one(*names):
            return sk.WithAxes(jax.random.normal(key, tuple(shape[n] for n in names)), names)

        column, row = ("layers", "embed", "mlp"), ("layers", "mlp", "embed")
        return [{"up": one(*column), "gate": one(*column), "down": one(*row)} for _ in range(2)]

    def pair(x, w):
        x = sk.nn.constrain(x, "batch", "length", "embed")
        hidden = sk.nn.constrain(jnp.tanh(x @ w["up"]) * (x @ w["gate"]), "batch", "length", "mlp")
        return sk.nn.constrain(x + hidden @ w["down"], "batch", "length", "embed")

    def loss(params, batch, key):
        def layer(x, w):
            return pair(pair(x, w[0]), w[1]), None

        return jnp.mean(jax.lax.scan(layer, batch["x"], params)[0] ** 2)

    report = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((rows, length, embed), jnp.float32)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=sk.strategies.data() | sk.strategies.tensor(),
    ).report()
    least = next(one for one in report.minima if one.axis == "tensor")
    activation = 4 * rows // 2 * length * embed
    assert least.bytes == layers * 8 * 3 / 4 * activation
    # Two pairs a layer, each with one all-reduce too many.
    (apart, model_state), *others = least.excess
    assert apart == "of gradients reduced separately for each product that shares an input"
    assert model_state == layers * 2 * 2 * 3 / 4 * activation
    assert least.wire - least.bytes == pytest.approx(
        model_state + sum(n for _, n in others), rel=0.01
    )
    (line,) = [one for one in str(report).splitlines() if one.startswith("tensor sends")]
    assert "more than its minimum: " in line
    assert Report.from_json(report.to_json()) == report


APART = {"up": P("data", "tensor"), "down": P("tensor", "data")}
WHOLE = {"up": P(None, "tensor"), "down": P("tensor", None)}


@pytest.mark.parametrize(
    ("params", "moments", "kind"),
    [(WHOLE, WHOLE, "data"), (APART, APART, "fsdp"), (WHOLE, APART, "zero")],
)
def test_minima_of_a_strategy_written_by_hand_follow_from_its_specs(params, moments, kind):
    strategy = sk.Strategy(
        params=sk.PathRules(params),
        opt_state=sk.PathRules({f"**/{name}": spec for name, spec in moments.items()}),
        batch=P("data"),
        activations=sk.AxisRules({"batch": "data", "mlp": "tensor"}),
    )
    made = sk.compile_step(
        loss,
        optax.sgd(0.1, momentum=0.9),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        mesh=sk.MeshSpec(data=4, tensor=2).build(),
        strategy=strategy,
    ).report()
    (least,) = made.minima
    assert (least.axis, least.kind) == ("data", f"{kind} by specs")
    one_gradient = 3 / 4 * 4 * (2 * EMBED * MLP) // 2
    assert least.bytes == {"data": 2, "fsdp": 3, "zero": 2}[kind] * one_gradient
    assert "No textbook minimum for tensor" in str(made)
