"""What is sent besides weights and gradients over axes of rows: who is named, what helps."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.config import load_config
from shardkit.report import Program, Report
from shardkit.report.communication._minimum import Minimum
from shardkit.report.findings._excess import _spare_blocks

from ._programs import recorded
from ._quick import some_quick

VOCAB, EMBED, MLP = 32, 16, 24
TOKENS = {"tokens": np.zeros((16, 8), np.int32)}
LOST = {"stored_contraction", "activation_gather"}


def init(key):
    def one(a, b):
        shape = {"vocab": VOCAB, "embed": EMBED, "mlp": MLP}
        return sk.WithAxes(jax.random.normal(key, (shape[a], shape[b])), (a, b))

    return {"table": one("vocab", "embed"), "up": one("embed", "mlp"), "down": one("mlp", "embed")}


def loss_with(constraint=lambda x: x):
    def loss(params, batch, key):
        x = params["table"][batch["tokens"]]  # rows are lost
        x = constraint(x)
        hidden = jnp.tanh(x @ params["up"])
        return jnp.mean((x + hidden @ params["down"]) ** 2)

    return loss


def tied(params, batch, key):
    x = params["table"][batch["tokens"]]
    return jnp.mean(jax.nn.logsumexp(x @ params["table"].T, -1))  # used again


def compiled(loss, sizes, strategy, init=init, batch=TOKENS, **options):
    devices = jax.devices()[: math.prod(sizes.values())]
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=batch,
        mesh=sk.MeshSpec(**sizes).build(devices=devices),
        strategy=strategy,
        **options,
    )


def by_kind(report):
    return {finding.kind: finding for finding in report.findings}


def test_the_line_that_loses_rows_is_named_and_a_constraint_there_ends_it():
    fsdp = sk.strategies.fsdp(), {"fsdp": 4}
    report = compiled(loss_with(), fsdp[1], fsdp[0]).report(try_fixes=True)
    (finding,) = report.findings
    assert (finding.kind, finding.axes) == ("stored_contraction", ("fsdp",))
    # Most is sent at the products, whose weights are right; they follow from the lookup.
    assert finding.source.code.endswith("# rows are lost")
    assert finding.fix.startswith('x = sk.nn.constrain(x, "batch", None, None) with the result at ')
    assert "activations=" not in finding.fix  # the strategy has the rule already
    assert "contract a dim split over fsdp" in finding.why
    rows = [report.ledger[number] for number in finding.rows]
    assert {row.kind for row in rows} == {"all-reduce"}
    assert finding.bytes == sum(row.wire_bytes for row in rows)
    (least,) = report.minima
    ((reason, explained),) = least.excess
    assert reason == "in the findings"
    assert explained == pytest.approx(least.wire - least.bytes, abs=1)

    # What the findings say remains is what is sent when their code is written into the model.
    mended = compiled(loss_with(lambda x: sk.nn.constrain(x, "batch", None, None)), *fsdp[::-1])
    after = mended.report()
    (lookup,) = after.findings  # in a table that is split: only the other mode gathers it
    assert lookup.fix.startswith('mode="shard_map", which gathers the weights used at ')
    assert lookup.bytes * 10 < finding.bytes
    assert 3 * after.ledger.total() < report.ledger.total()
    other = compiled(loss_with(), *fsdp[::-1], mode="shard_map").report()
    assert not other.findings
    assert finding.remaining == min(after.ledger.total(), other.ledger.total())
    kib = f"{after.ledger.total() / 1024:.2f} KiB"
    assert f"with this constraint {kib}; with mode=" in finding.fix
    assert Report.from_json(report.to_json()) == report


def test_a_constraint_of_rows_is_tried_in_gradient_shards_too():
    strategy, accumulate = sk.strategies.fsdp(), sk.Accumulate(2)
    step = compiled(loss_with(), {"fsdp": 4}, strategy, accumulate=accumulate)
    findings = step.report(try_fixes=True).findings
    finding = next(one for one in findings if "constrain" in one.alternatives)
    mended = loss_with(lambda x: sk.nn.constrain(x, "batch", None, None))
    after = compiled(mended, {"fsdp": 4}, strategy, accumulate=accumulate).report().ledger.total()
    assert f"; with this constraint {after / 1024:.2f} KiB; with mode=" in finding.fix


def test_rows_are_lost_first_where_they_are_moved_over_another_axis_too():
    """The lookup permutes tokens over both axes; what is gathered over one alone comes after it."""

    def loss(params, batch, key):
        x = params["table"][batch["tokens"]]  # the lookup
        x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(x @ params["head"], batch["tokens"]).mean()

    shapes = {"table": (512, 64), "up": (64, 256), "down": (256, 64), "head": (64, 512)}
    rules = {"table": P(None, "data"), "down": P("tensor"), "*": P(None, "tensor")}
    report = compiled(
        loss,
        {"data": 2, "tensor": 4},
        sk.Strategy(params=sk.PathRules(rules), batch=P("data")),
        init=lambda key: {name: jnp.ones(shape) for name, shape in shapes.items()},
        batch={"tokens": np.zeros((16, 32), "i")},
    ).report(try_fixes=True)
    finding = by_kind(report)["activation_gather"]
    assert finding.source.code.endswith("# the lookup")
    assert finding.remaining < 0.75 * report.ledger.total()


def test_a_parameter_that_is_used_twice_is_reduced_once_in_the_other_mode():
    data = {"data": 4}, sk.strategies.data()
    table = {"init": lambda key: {"table": init(key)["table"]}}
    report = compiled(tied, *data, **table).report(try_fixes=True)
    (finding,) = report.findings
    assert (finding.kind, finding.leaf) == ("repeated_reduction", "params/table")
    assert "2 gradients are reduced over 'data' where 1 would do" in finding.why
    assert finding.bytes == 2 * 3 * 4 * VOCAB * EMBED // 4
    assert finding.source.code.endswith("# used again")
    other = compiled(tied, *data, **table, mode="shard_map").report()
    assert finding.remaining == other.ledger.total()
    assert other.ledger.total() == pytest.approx(report.ledger.total() - finding.bytes, abs=64)
    assert not other.findings
    assert not compiled(loss_with(), *data).report().findings


@pytest.mark.parametrize("right", [False, True])
def test_a_second_weight_split_by_columns_gathers_what_the_first_one_made(right):
    def loss(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["a"])
        return jnp.mean((hidden @ params["b"]) ** 2)  # the second product

    second = P("tensor", None) if right else P(None, "tensor")
    strategy = sk.Strategy(
        params=sk.PathRules({"a": P(None, "tensor"), "b": second}), batch=P("data")
    )
    report = compiled(
        loss,
        {"data": 2, "tensor": 4},
        strategy,
        init=lambda key: {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))},
        batch={"x": np.ones((64, 64), "f")},
    ).report()
    if right:  # as the finding says; a gather and a reduction more without
        assert not report.findings
        assert report.ledger.total("tensor") < 3 * 4 * 32 * 64
        return
    (finding,) = report.findings
    assert (finding.kind, finding.axes) == ("split_contraction", ("tensor",))
    assert "; beside it product_gather, 6.00 KiB" in finding.why
    if jax.__version__.startswith("0.10."):  # later programs gather next to the first product
        assert finding.source.code.endswith("# the second product")
    rule = "params=sk.first_match(sk.PathRules({\"b\": P('tensor', None)}), strategy.params)"
    assert finding.fix.startswith(rule)  # what `right` is
    gathered = 3 * 4 * 32 * 64 // 4
    summed = 2 * gathered  # the gradient of what the first product made
    assert finding.bytes == gathered + summed + 2 * 3 * 4 // 4  # and a scalar's sum


def test_reductions_of_each_micro_batch_are_tried_at_the_end():
    data, every = ({"data": 4}, sk.strategies.data()), sk.Accumulate(2, "every")
    report = compiled(loss_with(), *data, accumulate=every).report(try_fixes=True)
    (finding,) = report.findings
    assert (finding.kind, finding.alternatives) == ("reduction_in_loop", ("end",))
    after = compiled(loss_with(), *data, accumulate=sk.Accumulate(2, "end")).report()
    assert finding.remaining == after.ledger.total()
    assert after.ledger.total() == pytest.approx(report.ledger.total() - finding.bytes, abs=64)
    assert 'with reduce="end"' in finding.fix
    assert not after.findings


def share_explained(report):
    """Of what is sent beyond the minima and by the optimizer, the share that has a reason."""
    assert sum(cost.bytes for cost in report.by_source()) == report.ledger.total()
    # Moves of whole matrices to their owners are part of a minimum.
    products = [row for row in report.ledger if row.by_optimizer and not row.moves_matrices]
    own = sum(row.wire_bytes for row in products)
    named = by_kind(report).get("optimizer_collective")
    beyond, explained = own, min(own, named.bytes if named else 0)
    for least in report.minima:
        beyond += max(0, least.wire - least.bytes)
        explained += sum(size for _, size in least.excess)
    return explained / beyond if beyond > 1024 else 1.0


CONFIGS = "nano default fsdp fsdp_tensor context pipeline nano_moe llama2_7b llama3_8b".split()


@pytest.mark.parametrize("name", some_quick(CONFIGS, slow=set(CONFIGS) - {"nano", "fsdp"}))
def test_what_shipped_configs_send_beyond_the_minima_is_explained(name):
    config = load_config(name)
    small = dict(embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, vocab=256, kv_heads=4)
    model = dataclasses.replace(config.model, **small, loss_chunks=1)
    data = dataclasses.replace(config.data, seq_len=32, batch_size=16)
    mesh = sk.MeshSpec(fsdp=2, tensor=4) if name.startswith("llama") else config.mesh
    config = dataclasses.replace(config, model=model, data=data, mesh=mesh, devices="local")
    report = config.step_spec().compile(mesh.build()).report()
    assert share_explained(report) >= 0.9
    # On CPUs bf16 is sent as f32, over each axis.
    most = {"upcast_collective": 2, "optimizer_collective": 1}
    kinds = [finding.kind for finding in report.findings]
    assert all(kinds.count(kind) <= most.get(kind, 0) for kind in kinds), kinds


STRANGERS = {
    "decoder with names of its own": ("_models_mixture", "build"),
    "mixture of experts": ("_models_mixture", "build_mixture"),
    "gemma": ("_models_gemma", "build"),
    "linen transformer": ("_models_linen", "build"),
    "resnet": ("_models_resnet", "build"),
    "unet": ("_models_unet", "build"),
}


@pytest.mark.parametrize("layout", some_quick(["data", "fsdp"], slow=["fsdp"]))
@pytest.mark.parametrize("name", STRANGERS)
def test_what_strangers_models_send_beyond_the_minima_is_explained(name, layout):
    module, function = STRANGERS[name]
    model = getattr(importlib.import_module(f".{module}", __package__), function)()
    strategy, sizes = model.layouts[layout]
    step = compiled(model.loss_fn, sizes, strategy, init=model.init, batch=model.batch)
    report = step.report()
    assert share_explained(report) >= 0.9
    if layout == "fsdp" and ("decoder" in name or "mixture" in name):
        assert by_kind(report).keys() == LOST
        assert all(one.source.code == "x = table[tokens]" for one in report.findings)
        assert "activations=sk.AxisRules({\"batch\": 'fsdp'})" in report.findings[0].fix
        rest = step.report(try_fixes=True).findings[0].remaining
        assert rest <= 1.1 * report.minima[0].bytes < report.ledger.total() / 5


def test_blocks_of_a_windowed_product_beyond_a_ring_are_spare():
    mesh = (("fsdp", 4), ("tensor", 4))
    ledger = Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", "TPU v5p")).ledger
    row = next(row for row in ledger if row.windowed and row.group == 4)
    # Over 4 devices a ring moves 3 blocks a product; 11 are three products' and two more.
    spare = {3: 0, 5: 2 / 5, 6: 0, 11: 2 / 11, 2: 0}
    assert {n: pytest.approx(_spare_blocks(row, [row] * n)) for n in spare} == spare
    assert _spare_blocks(dataclasses.replace(row, windowed=False), [row] * 5) == 0


def test_what_no_reason_explains_is_said():
    mesh = (("fsdp", 4), ("tensor", 4))
    report = Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", "TPU v5p"))
    least = Minimum("fsdp", "fsdp", 1000.0, 1500, (("sent again by recomputation", 200),))
    said = " ".join(str(dataclasses.replace(report, minima=(least,))).split())
    parts = "200 B sent again by recomputation; 300 B for reasons unknown."
    assert f"fsdp sends 500 B more than its minimum: {parts}" in said
    whole = dataclasses.replace(least, excess=(("sent again by recomputation", 490),))
    assert whole.unexplained == 0
