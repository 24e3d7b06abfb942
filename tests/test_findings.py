"""Each finding on a small program that has the fault, and on one that has not."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.tree import Leaf
from shardkit.parallel import strategies
from shardkit.report import FINDINGS, Declarations, PlacedLeaf, Program, Report
from shardkit.report.findings._messages import find_involuntary_remats

from ._programs import (
    BATCH,
    HIDDEN,
    LAYERS,
    WEIGHTS,
    WIDTH,
    loss,
    make_mesh,
    program,
    recorded,
    rows,
    sgd,
    weights,
)

MESH = (("data", 2), ("tensor", 4))
MATRIX = 4 * LAYERS * WIDTH * HIDDEN
COLUMNS, ROWS = P(None, None, "tensor"), P(None, "tensor", None)


def findings(made, kind, **declared):
    changed = dataclasses.replace(made, declared=Declarations(**declared)) if declared else made
    return [finding for finding in Report.of(changed).findings if finding.kind == kind]


@pytest.fixture(scope="module")
def data_parallel():
    mesh = make_mesh(data=2, tensor=4)
    parts = {"params": weights(COLUMNS, ROWS), "batch": rows(P("data"), 256, WIDTH)}
    return program(sgd, mesh, whole=("params",), out=({"up": COLUMNS, "down": ROWS}, P()), **parts)


def test_a_sound_step_has_no_findings(data_parallel):
    kinds = (strategies.data() | strategies.tensor()).kinds
    declared = Declarations(kinds=kinds, compute_dtype="f32")
    report = Report.of(dataclasses.replace(data_parallel, declared=declared))
    assert report.findings == ()
    assert report.problems == ()


# What jax 0.10.2 and 0.12 print for one and the same program.
REMATS = {
    "tiles": (
        "{devices=[2,1,4]<=[8]}",
        "{devices=[1,8,1]<=[2,4]T(1,0)}",
        "P(None, ('data', 'tensor'), None)",
    ),
    "mesh": (
        "{mesh['data'=2,'tensor'=4], [{'data'}, {}, {'tensor'}]}",
        "{mesh['data'=2,'tensor'=4], [{}, {'tensor', 'data'}, {}]}",
        "P(None, ('tensor', 'data'), None)",
    ),
}


@pytest.mark.parametrize("form", REMATS)
def test_involuntary_remats_name_both_specs(form):
    source, target, spec = REMATS[form]
    log = (
        "W1123 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler "
        f"cannot go from sharding {source} to {target} efficiently for HLO operation "
        f"%sharding_constraint.0 = f32[4,16,8]{{2,1,0}} copy(%sin.0), sharding={source}, "
        'metadata={op_name="jit(f)/block/sharding_constraint" stack_frame_id=3}. As the last '
        "resort, SPMD will replicate the tensor\nsomething else\n"
    )
    (finding,) = findings(Program("ENTRY %e () -> f32[] {\n}\n", MESH, "cpu", log=log + log),
                          "involuntary_remat")  # fmt: skip
    assert finding.scope == "block"
    assert finding.bytes == 4 * 8 * 16 * 32
    assert finding.axes == ("data", "tensor")
    between = "P(None, 'data', 'tensor')"
    assert f"with_sharding_constraint(x, NamedSharding(mesh, {between})) in between" in finding.fix
    assert f"f32[8,16,32] goes from P('data', None, 'tensor') to {spec};" in finding.why
    assert find_involuntary_remats("all is well", MESH) == []


def test_replicated_leaves_that_no_rule_declares():
    mesh = make_mesh(data=2, tensor=4)

    def step(params, opt_state, x):
        return params, opt_state, loss(params, x)

    made = program(
        step,
        mesh,
        params=weights(COLUMNS, ROWS),
        opt_state=weights(COLUMNS, P()),
        batch=rows(P("data")),
    )
    (finding,) = findings(made, "replicated")
    assert finding.leaf == "opt_state/down"
    assert finding.bytes == MATRIX
    assert finding.axes == ("data", "tensor")
    assert "all 8 devices hold the whole of down f32[3,32,8]" in finding.why
    # The largest dim that the largest axis divides: 3 layers are not to be split.
    assert """opt_state=sk.PathRules({"down": P(None, 'tensor', None)}), or""" in finding.fix


def test_donations_that_nothing_reuses(data_parallel):
    given = [dataclasses.replace(leaf, donated=True) for leaf in data_parallel.leaves]
    found = findings(dataclasses.replace(data_parallel, leaves=tuple(given)), "unaliased_donation")
    assert {finding.leaf for finding in found} == {"params/up", "params/down", "batch"}
    mesh = make_mesh(data=8)
    parts = {"params": weights(), "batch": rows(P("data"))}
    assert not findings(program(sgd, mesh, donate=("params",), **parts), "unaliased_donation")


def test_a_state_that_is_returned_as_it_came_is_reused():
    """A state that is returned in another dtype needs memory of its own; one that is not, none."""

    def narrow(params, x):
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16), sgd(params, x)[0])

    def same(params, x):
        return sgd(params, x)[0]

    parts = {"params": weights(), "batch": rows(P("data"))}
    before = program(narrow, make_mesh(data=8), donate=("params",), **parts)
    found = findings(before, "unaliased_donation")
    assert {finding.leaf for finding in found} == {"params/up", "params/down"}
    assert {finding.fix for finding in found} == {
        "return it with the shape, dtype and spec of the argument"
    }
    after = program(same, make_mesh(data=8), donate=("params",), **parts)
    assert not findings(after, "unaliased_donation")
    spared = after.memory.alias - before.memory.alias
    assert spared == sum(finding.bytes for finding in found) == WEIGHTS


def test_a_reduction_in_the_accumulation_loop():
    mesh = make_mesh(data=8)

    def naive(params, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    micro = rows(P(None, "data"), 4, BATCH, WIDTH)
    made = program(naive, mesh, whole=("params",), params=weights(), batch=micro)
    (finding,) = findings(made, "reduction_in_loop", accumulate=4)
    assert finding.axes == ("data",)
    assert finding.scope == "mlp"
    assert "reduced 4 times per step over 'data', with 4 micro-batches" in finding.why
    # Three of four reductions are in vain.
    assert finding.bytes == pytest.approx(3 * 2 * 7 / 8 * WEIGHTS, rel=1e-3)
    assert Report.of(made).reductions == {"data": 4.0}
    assert 'Accumulate(4, reduce="end")' in finding.fix
    (finding,) = findings(made, "reduction_in_loop", accumulate=4, reduce_at_end=True)
    assert finding.fix.startswith('mode="shard_map"')  # the other is declared already


def test_a_reduction_in_a_loop_of_the_model_is_found_without_declared_accumulation():
    """The model's own loop over micro-batches, whose sum XLA moves no reduction out of."""

    def own_loop(params, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    micro = rows(P(None, "data"), 4, BATCH, WIDTH)
    made = program(own_loop, make_mesh(data=8), params=weights(), batch=micro)
    (finding,) = findings(made, "reduction_in_loop")
    assert "reduced 4 times per step over 'data', in a loop that adds up the results" in finding.why


@pytest.mark.parametrize("stacked", [True, False])
def test_reductions_of_a_step_that_accumulates_nothing_are_no_alarm(stacked):
    """Each weight is used twice, so that two arrays of its gradient's size are reduced."""
    mesh = make_mesh(data=8)

    def twice(x, w):
        one = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("data")))
        return jnp.tanh(one @ w), None

    def mean(params, x):
        if stacked:
            return jnp.mean(jax.lax.scan(twice, x, params["w"])[0] ** 2)
        return jnp.mean(twice(x, params["w"])[0] ** 2)

    shape = (LAYERS, 16, 16) if stacked else (16, 16)
    parts = {"params": {"w": (shape, P())}, "batch": rows(P("data"), 64, 16)}
    made = program(jax.grad(mean), mesh, **parts)
    assert Report.of(made).reductions["data"] == 2
    assert not findings(made, "reduction_in_loop")


def test_collectives_that_the_strategy_does_not_explain(data_parallel):
    found = findings(data_parallel, "unexplained_collective", kinds=strategies.data().kinds)
    assert {finding.axes for finding in found} == {("tensor",)}
    assert {finding.scope for finding in found} == {"mlp"}
    wire = Report.of(data_parallel).ledger.total("tensor")
    assert sum(finding.bytes for finding in found) == wire
    assert not findings(data_parallel, "unexplained_collective")
    assert "| strategies.own('tensor', sends=('all-reduce',))" in found[0].fix
    own = strategies.data() | strategies.own("tensor", sends=("all-reduce",))
    assert not findings(data_parallel, "unexplained_collective", kinds=own.kinds)


def test_a_parameter_that_is_gathered_whole():
    mesh = make_mesh(data=2, tensor=4)
    split = {"w": ((64, 64), P("tensor", None))}

    def step(params, x):
        whole = jax.lax.with_sharding_constraint(params["w"], NamedSharding(mesh, P()))
        with jax.named_scope("head"):
            return x @ whole

    made = program(step, mesh, params=split, batch=rows(P("data"), 8, 64))
    (finding,) = findings(made, "parameter_gather", kinds=strategies.tensor().kinds)
    assert finding.leaf == "params/w"
    assert finding.bytes == 3 * 4 * 64 * 64 // 4
    assert "w f32[64,64] is split over tensor and gathered whole by 1 × all-gather" in finding.why
    assert not findings(made, "parameter_gather", kinds=strategies.fsdp("tensor").kinds)


@pytest.mark.parametrize("gathered", ["a", "b", "c"])
def test_of_several_parameters_in_a_loop_the_one_that_is_gathered_is_named(gathered):
    """Layers of equal shape, `c` split as the others' transpose is."""
    mesh = make_mesh(data=2, tensor=4)

    @jax.checkpoint
    def layer(x, w):
        for name, matrix in sorted(w.items()):
            if name == gathered:
                matrix = jax.lax.with_sharding_constraint(matrix, NamedSharding(mesh, P()))
            x = jnp.tanh(x @ matrix)
        return x, None

    def mean(params, x):
        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    shape = (LAYERS, 64, 64)
    params = {"a": (shape, COLUMNS), "b": (shape, COLUMNS), "c": (shape, ROWS)}
    made = program(jax.grad(mean), mesh, params=params, batch=rows(P("data"), 64, 64))
    (finding,) = findings(made, "parameter_gather", kinds=strategies.tensor().kinds)
    assert finding.leaf == f"params/{gathered}"
    assert finding.why.endswith("by 2 × all-gather")
    assert finding.bytes == 2 * LAYERS * 3 * 4 * 64 * 64 // 4


COMBINED = """HloModule m, is_scheduled=true, num_partitions=4
ENTRY %main (b: f32[64,16], w: f32[64,32]) -> (f32[64,64], f32[64,128]) {
  %b = f32[64,16]{1,0} parameter(0)
  %w = f32[64,32]{1,0} parameter(1)
  ROOT %both = (f32[64,64], f32[64,128]) all-gather(%b, %w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}, use_global_device_ids=true
}
"""  # noqa: E501


def test_a_gather_of_several_parameters_names_each():
    leaves = tuple(
        PlacedLeaf("params", Leaf(name, (64, size), np.dtype("float32")), P(None, "tensor"))
        for name, size in (("b", 64), ("w", 128))
    )
    made = Program(COMBINED, (("tensor", 4),), "gpu", leaves=leaves)
    found = findings(made, "parameter_gather", kinds=strategies.tensor().kinds)
    sizes = {finding.leaf: finding.bytes for finding in found}
    assert sizes == {"params/b": 3 * 4 * 64 * 16, "params/w": 3 * 4 * 64 * 32}


def test_wide_collectives_under_a_narrow_policy(data_parallel):
    found = findings(data_parallel, "upcast_collective", compute_dtype="bf16", reduce_dtype="f32")
    # Gradients may be reduced in f32; the activations that `tensor` reduces may not.
    ledger = Report.of(data_parallel).ledger
    assert [finding.axes for finding in found] == [("tensor",)]
    assert found[0].bytes == ledger.total("tensor") // 2
    assert "all-reduce under a bf16 policy, the largest of f32[128,8]" in found[0].why
    assert "XLA's CPU backend itself widens bf16" in found[0].fix
    whole = program(sgd, make_mesh(data=8), params=weights(), batch=rows(P("data")))
    assert findings(whole, "upcast_collective", compute_dtype="bf16")
    assert not findings(whole, "upcast_collective", compute_dtype="bf16", reduce_dtype="f32")
    assert not findings(data_parallel, "upcast_collective", compute_dtype="f32")


def test_wide_collectives_of_a_tpu_program():
    declared = Declarations(compute_dtype="bf16")
    mesh = (("fsdp", 4), ("tensor", 4))
    made = Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", declared=declared)
    first = findings(made, "upcast_collective")[0]
    # The gradient of f32 attention logits changes its dim, in each of 4 layers.
    assert first.scope.startswith("attention")
    assert "the largest of f32[8,8,4,256,1024]" in first.why
    assert first.bytes >= 4 * 3 / 4 * 4 * 8 * 8 * 4 * 256 * 1024 / 2
    assert "CPU" not in first.fix


def test_resharding_between_dims():
    mesh = make_mesh(data=8)

    def step(x):
        with jax.named_scope("block"):
            other = NamedSharding(mesh, P(None, "data"))
            return jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), other))

    made = program(step, mesh, out=P(None, "data"), batch=rows(P("data"), 64, 64))
    (finding,) = findings(made, "resharding")
    assert finding.scope == "block"
    assert finding.axes == ("data",)
    assert finding.bytes == 7 * 4 * 64 * 64 // 8 // 8


def test_second_compiles_and_rules_are_passed_on(data_parallel):
    twice = dataclasses.replace(data_parallel, compiles=2)
    assert findings(twice, "second_compile")[0].why == "the step was compiled 2 times"
    named = dataclasses.replace(twice, retraced=("batch/x changed its shape: f32[8], is f32[4]",))
    (finding,) = findings(named, "second_compile")
    assert (finding.leaf, finding.why[-21:]) == ("batch/x", "shape: f32[8], is f32[4]"[-21:])
    rules = ("PathRules['**/gate'] matches nothing",)
    assert findings(data_parallel, "unused_rule", rules=rules)[0].why == rules[0]


def test_every_kind_is_explained_on_the_page_about_reports():
    page = pathlib.Path(__file__).parents[1].joinpath("docs/report/read.md").read_text("utf-8")
    assert [kind for kind in FINDINGS if f"`{kind}`" not in page] == []


def test_every_finding_is_of_a_listed_kind():
    made = Program(recorded("tpu_v5p_fsdp_tensor"), (("fsdp", 4), ("tensor", 4)), "tpu")
    report = Report.of(made)
    assert {finding.kind for finding in report.findings} <= set(FINDINGS)
    sizes = [finding.bytes for finding in report.findings]
    assert sizes == sorted(sizes, reverse=True)


def test_an_array_that_is_closed_over_is_a_constant_on_every_device():
    mesh = make_mesh(data=2)
    table = np.arange(2**18, dtype=np.float32).reshape(512, 512)

    def step(params, batch):
        with jax.named_scope("lookup"):
            return params + batch @ table @ table.T, params

    parts = {"params": ((8, 512), P()), "batch": ((8, 512), P("data"))}
    (found, *_) = findings(program(step, mesh, **parts), "large_constant")
    assert found.bytes == 2**20
    assert "f32[512,512] is a constant of the program: every device holds it" in found.why
    assert "pass it as a parameter" in found.fix
