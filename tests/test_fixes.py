"""Fixes of findings as the report words them: their code is pasted, and the finding is gone."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.source import Source
from shardkit.report import FINDINGS
from shardkit.step._split_dims import DeclaredLayout

from . import test_findings, test_idle_options, test_miscompiled, test_row_axes, test_step_report
from ._misplaced import declare
from ._misplaced_models import MODELS
from ._misplaced_two import TWO

EMBED, MLP = 256, 1024
HAND = sk.Strategy(
    params=sk.PathRules({"up": P(None, "tensor"), "down": P("tensor", None)}),
    batch=P("data"),
    activations=sk.AxisRules({"batch": "data", "mlp": "tensor", "both": ("data", "tensor")}),
)


def init(key):
    return {
        "up": sk.WithAxes(jax.random.normal(key, (EMBED, MLP)), ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(key, (MLP, EMBED)), ("mlp", "embed")),
    }


def loss_with(*names):
    def loss(params, batch, key):
        with jax.named_scope("mlp"):
            hidden = sk.nn.constrain(jnp.tanh(batch["x"] @ params["up"]), *names)
            return jnp.mean((hidden @ params["down"]) ** 2)

    return loss


def compiled(
    loss, strategy=HAND, rows=64, init=init, width=EMBED, dtype=jnp.float32, precision=None, **more
):
    return sk.compile_step(
        loss,
        optax.adam(1e-3),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((rows, width), dtype)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=strategy,
        precision=precision,
        **more,
    )


def found(step, kind):
    return [one for one in step.report().findings if one.kind == kind]


def test_an_activation_that_is_constrained_gathers_no_parameter():
    # 4096 rows: the gathered `down` f32[1024,256] looks like a quarter of x f32[4096,256].
    step = compiled(loss_with("batch", None), rows=4096)
    sent, *_ = (one for one in step.report().findings if one.rows)
    assert "; beside it parameter_gather, " in sent.why
    assert sent.fix.startswith("sk.nn.constrain(x, 'batch', 'mlp') in the constraint at ")
    assert {one.axes for one in found(step, "replicated_activation")} == {("tensor",)}
    assert not found(compiled(loss_with("batch", "mlp")), "parameter_gather")


def test_a_gradient_that_is_gathered_is_no_parameter():
    whole = sk.PathRules({"up": P(None, "tensor"), "*": P()})
    step = compiled(loss_with("batch", "mlp"), dataclasses.replace(HAND, params=whole))
    # As large as a shard of `up`, and of the gradient of `down`, which every device is to hold.
    assert step.report().ledger.where("tensor", "all-gather")
    assert not found(step, "parameter_gather")


def test_a_rule_of_a_finding_splits_the_leaf():
    strategy = dataclasses.replace(HAND, params=sk.AxisRules({"embed": None, "mlp": None}))
    names = {
        one.leaf: one for one in found(compiled(loss_with("batch", None), strategy), "replicated")
    }
    code, _, meant = names["params/up"].fix.partition(", or sk.REPLICATED")
    assert (
        code
        == """params=sk.first_match(sk.PathRules({"up": P(None, 'tensor')}), strategy.params)"""
    )
    assert meant == " if intended"
    own, *_ = names["opt_state/0/mu/down"].fix.partition(", or")
    assert own == """opt_state=sk.PathRules({"0/mu/down": P('tensor', None)})"""
    scope = {"sk": sk, "P": P, "strategy": strategy}
    changed = eval(f"dict({code}, {own})", scope)
    mended = dataclasses.replace(strategy, **changed)
    left = {one.leaf for one in found(compiled(loss_with("batch", None), mended), "replicated")}
    # Moments follow their parameter; those of `down` but one are as they were.
    assert left == {"params/down", "opt_state/0/nu/down"}


def test_a_constraint_in_between_spares_the_rematerialization():
    def init(key):
        return {"up": jax.random.normal(key, (32, 64)), "down": jnp.zeros(())}

    def loss_by(between):
        def loss(params, batch, key):
            with jax.named_scope("twist"):
                x = sk.nn.constrain(
                    jnp.sin(batch["x"][:, :, None] * params["up"]), "batch", None, "mlp"
                )
                x = between(x)
                return jnp.mean(jnp.cos(sk.nn.constrain(x, None, "both", None))) + params["down"]

        return loss

    rules = sk.PathRules({"up": P(None, "tensor"), "down": P()})
    strategy = dataclasses.replace(HAND, params=rules)
    given = {"strategy": strategy, "rows": 8, "init": init, "width": 32}
    remats = found(compiled(loss_by(lambda x: x), **given), "involuntary_remat")
    assert {one.bytes for one in remats} == {4 * 8 * 32 * 64}
    assert remats[0].source.function.endswith("loss_by.<locals>.loss")
    code, _, why = remats[0].fix.partition(" in between")
    assert why.startswith(", so that one mesh axis moves at a time; then measure")
    between = eval(f"lambda x: {code}", {"sk": sk})
    assert not found(compiled(loss_by(between), **given), "involuntary_remat")


def test_a_second_compile_names_what_changed():
    strategy = dataclasses.replace(HAND, params=sk.REPLICATED)
    step = compiled(loss_with("batch", None), strategy, rows=16, init=lambda key: {
        "up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}, width=8)  # fmt: skip
    state = step.init(jax.random.key(0))
    with pytest.warns(sk.RetraceWarning):
        step(state, {"x": jnp.ones((32, 8))})
    (finding,) = found(step, "second_compile")
    assert finding.leaf == "batch/x"
    assert "declared as f32[16,8], is f32[32,8]" in finding.why
    assert finding.fix.startswith("pad batches to one shape")
    padded = compiled(loss_with("batch", None), strategy, rows=32, init=lambda key: {
        "up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}, width=8)  # fmt: skip
    state = padded.init(jax.random.key(0))
    for rows in (16, 32):
        state, _ = padded(state, {"x": jnp.pad(jnp.ones((rows, 8)), ((0, 32 - rows), (0, 0)))})
    assert not found(padded, "second_compile")


@dataclasses.dataclass
class Mended:
    """A step with a fault, and the step as a finding's fix makes of it."""

    kind: str
    fix: str
    before: dict
    after: dict
    in_memory: bool = False


def cast_by(cast):
    def loss(params, batch, key):
        hidden = cast(jnp.tanh((batch["x"] @ params["up"]).astype(jnp.float32)))
        return jnp.mean((hidden @ params["down"].astype(hidden.dtype)).astype(jnp.float32) ** 2)

    return loss


def gathered_by(cast):
    def loss(params, batch, key):
        hidden = cast(jnp.tanh((batch["x"] @ params["up"]).astype(jnp.float32)))
        hidden = sk.nn.constrain(hidden, "batch", None)
        return jnp.mean(jnp.roll(hidden, 1, -1).astype(jnp.float32) ** 2)

    return loss


def entering(*names):
    """Layers over [rows, width], or over [sequences, length, width]."""

    def loss(params, batch, key):
        def layer(x, w):
            x = sk.nn.constrain(x, *names) if len(names) == 3 else x
            return jnp.tanh(jnp.tanh(x @ w["up"]) @ w["down"]), None

        x = (
            batch["x"].reshape(-1, 64, 64)
            if len(names) == 3
            else sk.nn.constrain(batch["x"], *names)
        )
        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    return loss


def disagreeing(*second):
    def loss(params, batch, key):
        hidden = sk.nn.constrain(jnp.tanh(batch["x"] @ params["up"]), "batch", "mlp")
        hidden = sk.nn.constrain(jnp.sin(hidden), *second)
        return jnp.mean((hidden @ params["down"]) ** 2)

    return loss


def layers(key):
    names = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
    return {name: sk.WithAxes(jnp.ones((3, 64, 64)), axes) for name, axes in names.items()}


HALF = {"init": init, "dtype": jnp.float16, "precision": sk.Precision("float32", "float16")}
WHOLE = dataclasses.replace(HAND, params=sk.REPLICATED)
ROWS = {"init": layers, "rows": 4096, "width": 64, "strategy": WHOLE}
BOTH = sk.strategies.data() | sk.strategies.tensor()
LENGTH = {**ROWS, "loss": entering("batch", "residual_length", "embed"), "strategy": BOTH}
SEQUENCE = sk.strategies.data() | sk.strategies.tensor(sequence=True)
OWN = {"strategy": sk.strategies.data().with_names(activations={"mlp": "tensor"})}
MENDED = {
    "a cast of what is summed": Mended(
        "upcast_collective",
        "x.astype(jnp.float16) on what is multiplied or added",
        {**HALF, "loss": cast_by(lambda x: x)},
        {**HALF, "loss": cast_by(lambda x: x.astype(jnp.float16))},
    ),
    "a cast of what is gathered": Mended(
        "upcast_collective",
        "x = sk.nn.constrain(x.astype(jnp.float16), ...) as x is split",
        {**HALF, "loss": gathered_by(lambda x: x)},
        {
            **HALF,
            "loss": gathered_by(lambda x: sk.nn.constrain(x.astype(jnp.float16), "batch", "mlp")),
        },
    ),
    "rows": Mended(
        "replicated_activation",
        'sk.nn.constrain(x, "batch", ...) where it is made',
        {**ROWS, "loss": entering(None, None)},
        {**ROWS, "loss": entering("batch", None)},
        in_memory=True,
    ),
    "a name": Mended(
        "replicated_activation",
        "sk.nn.constrain(x, ...) with a name that activations map there",
        {**ROWS, "loss": entering("batch", None)},
        {**ROWS, "loss": entering("both", None)},
        in_memory=True,
    ),
    "sequence": Mended(
        "replicated_activation",
        "strategies.tensor(sequence=True)",
        LENGTH,
        {**LENGTH, "strategy": SEQUENCE},
        in_memory=True,
    ),
    "one name": Mended(
        "parameter_gather",
        "sk.nn.constrain(x, 'batch', 'mlp') in the constraint at ",
        {"loss": disagreeing("batch", None)},
        {"loss": disagreeing("batch", "mlp")},
    ),
    "two specs": Mended(
        "unexplained_collective",
        "sk.nn.constrain(x, ...) the inputs and outputs of this scope",
        {**OWN, "loss": loss_with("batch", "mlp")},
        {**OWN, "loss": loss_with("batch", None)},
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_the_fix_of_a_finding_brings_the_bytes_down(name, request):
    case = MENDED[name]
    if case.before.get("dtype") == jnp.float16:
        request.getfixturevalue("float16")
    before, after = compiled(**case.before), compiled(**case.after)
    (finding, *_) = found(before, case.kind)
    assert finding.fix.startswith(case.fix)
    left = [one for one in found(after, case.kind) if set(one.axes) == set(finding.axes)]
    assert not left
    then, now = before.report(), after.report()
    if case.in_memory:  # what is kept is divided by the size of the axes, not gone
        assert then.memory.temp - now.memory.temp > finding.bytes / 2
    else:
        assert now.ledger.total() <= then.ledger.total() - finding.bytes


# A misplaced declaration, the finding of it, and what its fix changes.
FIXED = {
    "heads_split_inside": (
        "split_contraction",
        "params=sk.first_match(sk.PathRules({\"k\": P(None, 'tensor', None), ",
        {"params": sk.PathRules({"*": P(None, "tensor", None)})},
    ),
    "tied_table_split_by_columns": (
        "split_contraction",
        "params=sk.first_match(sk.PathRules({\"table\": P('tensor', None)}), ",
        {"params": sk.PathRules({"table": P("tensor", None)})},
    ),
    "cumulative_sum_over_a_split_dim": (
        "dim_gather",
        "P('data', None, 'tensor') in the constraint at ",
        {"activations": sk.AxisRules({"batch": "data", "length": None})},
    ),
    "gate_split_otherwise": (
        "gradient_gather",
        "params=sk.first_match(sk.PathRules({\"gate\": P(None, 'tensor')}), ",
        {"params": sk.PathRules({"down": P("tensor"), "*": P(None, "tensor")})},
    ),
    "residual_constrained_twice": (
        "spec_mismatch",
        "sk.nn.constrain(x, 'batch', None, None) in the constraint at ",
        {"activations": sk.AxisRules({"batch": "data", "embed": None})},
    ),
    "average_of_another_layout": (
        "resharding",
        "model_state=sk.first_match(sk.PathRules({\"w\": P(None, 'tensor')}), ",
        {"model_state": sk.PathRules({"w": P(None, "tensor")})},
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_the_fix_of_a_misplaced_declaration_ends_what_is_sent(name):
    kind, fix, changes = FIXED[name]
    spec, mesh = declare(name, MODELS.get(name))
    mesh = mesh.build()
    before = spec.compile(mesh).report()
    if jax.__version__.startswith("0.10."):  # later compilers send some of it by other collectives
        (finding, *_) = [one for one in before.findings if one.kind == kind]
        assert finding.fix.startswith(fix)
        assert finding.source.code.endswith(f"# {name}")
    strategy = dataclasses.replace(spec.strategy, **changes)
    after = spec.replace(strategy=strategy).compile(mesh).report()
    assert kind not in {one.kind for one in after.findings}
    total = before.ledger.total()
    assert after.ledger.total() <= max(0.75 * total, total - before.findings[0].bytes)


def test_a_name_that_parameters_have_too_is_mapped_as_theirs():
    """What activations say of it is wrong; the fix, pasted, sends what it was tried to send."""
    strategy = sk.strategies.data() | sk.strategies.tensor()
    wrong = strategy.with_names(activations={"mlp": None})
    report = compiled(loss_with("batch", "mlp"), wrong).report(try_fixes=True)
    finding = report.findings[0]
    code, *_ = finding.fix.partition(", which all other declarations agree with")
    assert code == "strategy.with_names(activations={'mlp': 'tensor'})"
    mended = eval(code, {"strategy": wrong})
    after = compiled(loss_with("batch", "mlp"), mended).report().ledger.total()
    assert finding.remaining == after < report.ledger.total()


@pytest.mark.parametrize(
    ("pin", "fix"),
    [
        (lambda x: sk.nn.constrain(x, "batch", None), "sk.nn.constrain(x, 'batch', 'mlp') in the "),
        pytest.param(
            lambda x: jax.lax.with_sharding_constraint(x, P("data", None)),
            "P('data', 'tensor') in the ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            jax.vmap(lambda row: sk.nn.constrain(row, None)),
            "P('tensor') in the ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_constraint_within_gradient_shards_is_changed_as_the_model_has_it(pin, fix):
    """In the step it is of f32[2,16,1024], and the dim over shards is none of the model's."""
    step = compiled(
        lambda params, batch, key: jnp.mean((pin(batch["x"] @ params["up"]) @ params["down"]) ** 2),
        accumulate=sk.Accumulate(2),
    )
    report = step.report(try_fixes=True)
    finding = report.findings[0]
    assert finding.fix.startswith(fix)
    assert finding.remaining < report.ledger.total()


@pytest.mark.parametrize(
    ("added", "names"), [("(gradient shards)", ("batch", None)), ("(mapped)", ())]
)
def test_a_moved_constraint_has_no_name_that_a_vmap_added(added, names):
    shape = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
    declared = DeclaredLayout(
        "a constraint",
        SimpleNamespace(aval=shape),
        (("data",), (), ("tensor",)),
        names=(added, "batch", "mlp"),
        shards=0,
    )
    moved = declared.change(Source("model.py", 3, "loss"), "tensor", (("data",), (), ()))
    assert (moved.shape, moved.layout, moved.names) == ((32, 64), (("data",), ()), names)


def test_a_weight_over_an_axis_of_rows_alone_is_whole_by_its_fix():
    """Data parallelism stores no weights, so that a rule which splits one over it is at odds."""
    data = sk.strategies.data() | sk.strategies.tensor()
    odd = sk.first_match(sk.PathRules({"up": P("data", "tensor")}), data.params)
    step = compiled(loss_with("batch", "mlp"), dataclasses.replace(data, params=odd))
    finding = step.report(try_fixes=True).findings[0]
    code = "params=sk.first_match(sk.PathRules({\"up\": P(None, 'tensor')}), strategy.params)"
    assert (finding.kind, finding.fix[: len(code)]) == ("parameter_gather", code)
    after = compiled(loss_with("batch", "mlp"), data).report().ledger.total()
    assert finding.remaining == after < step.report().ledger.total()


def test_what_no_fix_brings_down_is_kept_apart_in_every_form():
    spec, mesh = declare("", TWO["heads that are not divided"].both)
    step = spec.compile(mesh.build())
    plain, tried = step.report(), step.report(try_fixes=True)
    assert "Fix, not tried: params=" in str(plain)
    assert (plain.kept, tried.findings) == ((), ())
    (kept,) = tried.kept
    assert kept.tried
    assert kept.remaining > tried.ledger.total()
    assert f"Kept, since no fix is known to send less: {kept.kind} 16.00 KiB, " in str(tried)
    again = sk.report.Report.from_json(tried.to_json())
    assert again.kept == tried.kept
    assert not any(cost.in_findings for cost in again.by_source())


def test_a_mode_that_has_no_place_for_an_axis_is_no_fix():
    def loss(params, batch, key):
        return sum(jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2) for x in batch["x"])

    step = sk.compile_step(
        loss,
        optax.adam(1e-3),
        init=init,
        batch={"x": (jnp.ones((64, EMBED)), jnp.ones((64, EMBED)))},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=HAND,
    )
    report = step.report()
    assert not any("shard_map" in one.fix for one in report.findings)
    assert {one.kind for one in report.kept} == {"repeated_reduction"}


def test_moments_laid_out_as_the_fix_says_are_not_moved():
    spec, mesh = declare("optimizer_on_another_layout")
    mesh = mesh.build()
    before = spec.compile(mesh).report(try_fixes=True)
    (finding,) = before.findings
    assert 'declared by PathRules["**/w"] of opt_state/0/mu/w and ' in finding.why
    code = finding.fix.partition("opt_state=")[2].rpartition(", the layout of")[0]
    rule = eval(code, {"sk": sk, "P": P, "strategy": spec.strategy})
    strategy = dataclasses.replace(spec.strategy, opt_state=rule)
    after = spec.replace(strategy=strategy).compile(mesh).report()
    assert {one.kind for one in after.findings} == {"unused_rule"}  # the one before it decides
    assert after.ledger.total() <= before.ledger.total() - finding.bytes
    assert after.ledger.total() == finding.remaining


def test_a_constant_that_is_passed_as_a_parameter_is_none():
    table = np.arange(2.0**18, dtype=np.float32).reshape(1024, 256)

    def loss_of(read):
        return lambda p, b, key: jnp.mean((b["x"] @ p["w"] @ read(p)) ** 2)

    def step(loss, **more):
        return sk.compile_step(
            loss,
            optax.sgd(0.1),
            init=lambda key: {
                "w": jnp.ones((8, 1024)),
                **{k: jnp.ones(v) for k, v in more.items()},
            },
            batch={"x": jnp.ones((16, 8))},
            mesh=sk.MeshSpec(data=8).build(),
            strategy=sk.strategies.data(),
        )

    (constant, *_) = found(step(loss_of(lambda params: table)), "large_constant")
    assert "pass it as a parameter, as model_state or in the batch" in constant.fix
    passed = step(loss_of(lambda params: params["table"]), table=table.shape)
    assert not found(passed, "large_constant")


@pytest.mark.parametrize("width", [12, 16])
def test_a_size_that_divides_splits_the_moments(width):
    step = sk.compile_step(
        lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2),
        optax.adam(1e-3),
        init=lambda key: {"w": jnp.ones((4, width))},
        batch={"x": jnp.ones((16, 4))},
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.strategies.zero(),
    )
    leaves = {one.leaf for one in found(step, "replicated_optimizer_state")}
    assert leaves == (set() if width == 16 else {"opt_state/0/mu/w", "opt_state/0/nu/w"})


def test_moments_without_a_rule_of_their_own_follow_their_parameter():
    def compile(**options):
        return sk.compile_step(
            lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2),
            optax.adam(1e-3),
            init=lambda key: {"w": jnp.ones((64, 64))},
            batch={"x": jnp.ones((16, 64))},
            mesh=sk.MeshSpec(data=2, tensor=4).build(),
            strategy=sk.Strategy(
                params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data"), **options
            ),
        )

    whole, following = compile(opt_state=sk.REPLICATED), compile()
    (moments,) = found(whole, "replicated_optimizer_state")
    assert moments.leaf == "opt_state/0/mu/w"
    assert "f32[64,64] and 1 more like it, by REPLICATED, so that" in moments.why
    assert moments.bytes == 2 * 64 * 64 * 4 * 3 // 4
    assert not found(following, "replicated_optimizer_state")
    sent = [step.report().ledger.total() for step in (whole, following)]
    tried = whole.report(try_fixes=True).findings
    assert {one.remaining for one in tried} == {sent[1]}
    assert [one.kind for one in tried] == ["resharding", "replicated_optimizer_state"]
    assert sent[0] > 2 * sent[1]


def test_a_rule_that_decides_nothing_is_removed_without_another_layout():
    strategy = dataclasses.replace(HAND, params=sk.first_match(
        sk.PathRules({"gate": P()}, allow_unmatched=True), HAND.params))  # fmt: skip
    step = compiled(loss_with("batch", "mlp"), strategy)
    (unused,) = [one for one in found(step, "unused_rule") if "gate" in one.why]
    assert unused.fix.startswith("correct it, remove it")
    after = compiled(loss_with("batch", "mlp"))
    assert not any("gate" in one.why for one in found(after, "unused_rule"))
    assert after.report().ledger.total() == step.report().ledger.total()


# Of each kind the test that applies the fix, here or beside the program that has the fault.
APPLIED = {
    "miscompiled": test_miscompiled.test_a_miscompiled_step_is_right_in_the_order_of_its_finding,
    "involuntary_remat": test_a_constraint_in_between_spares_the_rematerialization,
    "replicated": test_a_rule_of_a_finding_splits_the_leaf,
    "replicated_activation": test_the_fix_of_a_finding_brings_the_bytes_down,
    "unaliased_donation": test_findings.test_a_state_that_is_returned_as_it_came_is_reused,
    "second_compile": test_a_second_compile_names_what_changed,
    "reduction_in_loop": test_row_axes.test_reductions_of_each_micro_batch_are_tried_at_the_end,
    "parameter_gather": test_the_fix_of_a_finding_brings_the_bytes_down,
    "spec_mismatch": test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    "upcast_collective": test_the_fix_of_a_finding_brings_the_bytes_down,
    "optimizer_collective": test_step_report.test_an_element_wise_optimizer_sends_none_of_it,
    "replicated_optimizer_state": test_a_size_that_divides_splits_the_moments,
    "large_constant": test_a_constant_that_is_passed_as_a_parameter_is_none,
    "replicated_model_state": (
        test_idle_options.test_model_state_that_is_whole_beside_split_parameters
    ),
    "idle_axis": test_idle_options.test_an_axis_that_only_the_update_uses,
    "idle_option": test_idle_options.test_a_pipeline_whose_stages_hold_every_layer,
    "unused_rule": test_a_rule_that_decides_nothing_is_removed_without_another_layout,
    "resharding": test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    "gradient_gather": test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    "activation_gather": (
        test_row_axes.test_the_line_that_loses_rows_is_named_and_a_constraint_there_ends_it
    ),
    "stored_contraction": (
        test_row_axes.test_the_line_that_loses_rows_is_named_and_a_constraint_there_ends_it
    ),
    "product_gather": (
        test_row_axes.test_a_second_weight_split_by_columns_gathers_what_the_first_one_made
    ),
    "dim_gather": test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    "split_contraction": test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    "repeated_reduction": (
        test_row_axes.test_a_parameter_that_is_used_twice_is_reduced_once_in_the_other_mode
    ),
    "unexplained_collective": test_the_fix_of_a_finding_brings_the_bytes_down,
}


def test_each_kind_of_finding_has_a_test_that_applies_its_fix():
    assert APPLIED.keys() == set(FINDINGS)
    table = {case.kind for case in MENDED.values()} | {kind for kind, *_ in FIXED.values()}
    tables = (
        test_the_fix_of_a_finding_brings_the_bytes_down,
        test_the_fix_of_a_misplaced_declaration_ends_what_is_sent,
    )
    assert table == {kind for kind, test in APPLIED.items() if test in tables}
