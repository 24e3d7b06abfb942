"""What a step tells of its own declaration: names, dead rules, and the optimizer's arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

import shardkit as sk

ROWS, EMBED, MLP = 256, 32, 64
TABLE = sk.PathRules({"up": P("fsdp"), "u*": P(None, "fsdp"), "gate": P()}, allow_unmatched=True)
NAMES = sk.AxisRules({"embed": "fsdp", "mlp": None, "mpl": None, "vocab": "tensor"})


def init(key):
    return {
        "up": sk.Named(jax.random.normal(key, (EMBED, MLP)), ("embed", "mlp")),
        "down": sk.Named(jax.random.normal(key, (MLP, EMBED)), ("mlp", "embed")),
    }


def loss(params, batch, key):
    hidden = sk.constrain(jnp.tanh(batch["x"] @ params["up"]), "batch", "mlp")
    return jnp.mean((hidden @ params["down"]) ** 2)


@pytest.fixture(scope="module")
def report():
    strategy = sk.Strategy(
        params=sk.chain(TABLE, NAMES),
        batch=P("fsdp"),
        activations=sk.AxisRules({"batch": "fsdp", "mlp": None, "btach": "fsdp", "heads": None}),
        kinds=(("fsdp", "fsdp"),),
    )
    return sk.compile_step(
        loss,
        contrib.muon(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        mesh=sk.MeshSpec(fsdp=8).build(),
        strategy=strategy,
    ).report()


def test_rules_that_do_nothing_are_findings(report):
    said = [finding.why for finding in report.findings if finding.kind == "rule"]
    assert said == [
        'params: PathRules["u*"] decides none of 1 leaf it matches: PathRules["up"] comes first',
        'params: PathRules["gate"] matches nothing',
        "params: AxisRules['mpl' → None] matches nothing. Did you mean 'mlp'?",
        "activations: AxisRules['btach' → 'fsdp'] matches nothing. Did you mean 'batch'?",
    ]


def test_parameters_keep_their_names(report):
    names = {leaf.path: leaf.names for leaf in report.leaves if leaf.part == "params"}
    assert names == {"up": ("embed", "mlp"), "down": ("mlp", "embed")}


def test_the_optimizers_own_products_reduce_no_gradient(report):
    (found,) = [f for f in report.findings if f.kind == "optimizer_collective"]
    own = [row for row in report.ledger if row.by_optimizer and row.payload_bytes > 1024]
    assert {row.phase for row in own} == {"update"}
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


def test_the_optimizers_products_are_no_model_flops(report):
    assert report.flops.model == 5 * 2 * ROWS * EMBED * MLP  # the input needs no gradient
    assert report.flops.update > 0
    assert report.flops.total == report.flops.model + report.flops.update
    assert f"{report.flops.update:.4g} by the optimizer" in str(report)
