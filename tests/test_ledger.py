"""The ledger against closed forms on eight simulated devices, and on recorded programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.errors import ReportError
from shardkit._core.tree import Leaf
from shardkit.parallel import strategies
from shardkit.report import Declarations, PlacedLeaf, Program, Report, read_ledger, wire_bytes
from shardkit.report.communication._minimum import axis_wire_bytes

from ._programs import (
    BATCH,
    LAYERS,
    SCALAR,
    WEIGHTS,
    WIDTH,
    layer,
    loss,
    make_mesh,
    program,
    recorded,
    ring,
    sgd,
    weights,
)


def compiled(step, mesh, *args):
    """Compiles `step` for `(shape, spec)` arguments and reads its ledger."""
    parts = {f"part{number}": arg for number, arg in enumerate(args)}
    made = program(step, mesh, **parts)
    return read_ledger(made.hlo, made.mesh)


@pytest.mark.parametrize("order", [None, [3, 1, 4, 0, 5, 7, 2, 6]])
def test_data_parallel_reduces_gradients_once(order):
    mesh = make_mesh(order, data=8)
    batch = ((BATCH, WIDTH), P("data"))

    ledger = compiled(sgd, mesh, weights(), batch)
    assert ledger.complete
    assert ledger.total() == ledger.total("data") == 2 * ring(8, WEIGHTS + SCALAR)
    assert ledger.total("data", "all-reduce") == ledger.total(kind="all_reduce")
    assert sum(row.wire_bytes for row in ledger.where(phase="backward")) == 2 * ring(8, WEIGHTS)
    assert {row.scope for row in ledger if row.phase == "backward"} == {"mlp"}


def test_accumulation_reduces_in_the_loop_unless_it_is_local():
    mesh = make_mesh(data=8)
    micro = ((4, BATCH, WIDTH), P(None, "data"))

    def in_the_loop(params, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P(), check_vma=False
    )
    def after_the_loop(params, xs):
        return jax.lax.psum(in_the_loop(params, xs), "data")

    naive = compiled(in_the_loop, mesh, weights(), micro)
    local = compiled(after_the_loop, mesh, weights(), micro)
    assert naive.complete
    assert local.complete
    assert naive.total() == 4 * 2 * ring(8, WEIGHTS)
    assert {row.trips for row in naive} == {4 * LAYERS}
    assert local.total() == 2 * ring(8, WEIGHTS)
    assert {row.trips for row in local} == {1}


def test_fsdp_gathers_twice_and_scatters_once():
    mesh = make_mesh(data=2, fsdp=4)

    @jax.checkpoint
    def gathered(x, w):
        up = jax.lax.all_gather(w["up"], "fsdp", axis=0, tiled=True)
        down = jax.lax.all_gather(w["down"], "fsdp", axis=0, tiled=True)
        return layer(x, {"up": up, "down": down})

    specs = {"up": P(None, "fsdp"), "down": P(None, "fsdp")}

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, P("fsdp")),
        out_specs=specs,
        check_vma=False,
    )
    def step(params, x):
        return jax.grad(lambda p: jnp.sum(jax.lax.scan(gathered, x, p)[0] ** 2))(params)

    ledger = compiled(step, mesh, weights(**specs), ((BATCH, WIDTH), P("fsdp")))
    assert ledger.complete
    assert ledger.total("fsdp", "all-gather") == ring(4, 2 * WEIGHTS)
    assert ledger.total("fsdp", "reduce-scatter") == ring(4, WEIGHTS)
    assert ledger.total() == ledger.total("fsdp")
    assert {row.phase for row in ledger.where(kind="all-gather")} == {"forward", "recompute"}
    assert {row.trips for row in ledger} == {LAYERS}


def test_zero_scatters_gradients_and_gathers_weights():
    mesh = make_mesh(data=8)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    def step(w, x):
        grad = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        shard = jax.lax.psum_scatter(grad, "data", scatter_dimension=0, tiled=True)
        start = jax.lax.axis_index("data") * shard.shape[0]
        mine = jax.lax.dynamic_slice_in_dim(w, start, shard.shape[0]) - shard
        return jax.lax.all_gather(mine, "data", tiled=True)

    ledger = compiled(step, mesh, ((32, 16), P()), ((8, 32), P("data")))
    size = 4 * 32 * 16
    assert ledger.complete
    assert ledger.total("data", "reduce-scatter") == ring(8, size)
    assert ledger.total("data") == ring(8, size + size)


def test_tensor_parallel_pays_one_all_reduce_per_pair_and_way():
    mesh = make_mesh(data=2, tensor=4)
    params = weights(up=P(None, None, "tensor"), down=P(None, "tensor", None))
    activation = 4 * BATCH // 2 * WIDTH
    ledger = compiled(jax.grad(loss, (0, 1)), mesh, params, ((BATCH, WIDTH), P("data")))
    assert ledger.complete
    # `loss` has one column-row pair per layer; a transformer layer has two, hence 8(n-1)/n.
    assert ledger.total("tensor") == LAYERS * 4 * ring(4, activation)
    assert ledger.total("data") == 2 * ring(2, WEIGHTS // 4)
    by_axes = ledger.by_axes()
    assert by_axes == {("tensor",): ledger.total("tensor"), ("data",): ledger.total("data")}


def test_tensor_with_sequence_moves_the_same_bytes():
    mesh = make_mesh(data=2, tensor=4)

    def pair(x, w):
        whole = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)
        out = jnp.tanh(whole @ w["up"]) @ w["down"]
        return x + jax.lax.psum_scatter(out, "tensor", scatter_dimension=0, tiled=True), None

    specs = {"up": P(None, None, "tensor"), "down": P(None, "tensor", None)}
    rows = P(("data", "tensor"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, rows), out_specs=(specs, rows), check_vma=False
    )
    def step(params, x):
        return jax.grad(lambda p, x: jnp.sum(jax.lax.scan(pair, x, p)[0] ** 2), (0, 1))(params, x)

    ledger = compiled(step, mesh, weights(**specs), ((BATCH, WIDTH), rows))
    activation = 4 * BATCH // 2 * WIDTH
    assert ledger.complete
    assert ledger.total("tensor") == LAYERS * 4 * ring(4, activation)
    assert ledger.total("tensor", "reduce-scatter") == LAYERS * 2 * ring(4, activation)


def test_permutes_all_to_alls_and_both_axes():
    mesh = make_mesh(data=2, tensor=4)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P(), check_vma=False
    )
    def step(x):
        shift = [(i, (i + 1) % 4) for i in range(4)]
        x = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.ppermute(x, "tensor", shift), x)
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return jax.lax.psum(jnp.sum(x), ("data", "tensor"))

    ledger = compiled(step, mesh, ((8, 16), P("data", "tensor")))
    block = 4 * 4 * 4
    assert ledger.total("tensor", "collective-permute") == 3 * block
    assert ledger.total("data", "all-to-all") == ring(2, block)
    assert ledger.total(("tensor", "data")) == 2 * ring(8, SCALAR)
    assert ledger.total("data") == ring(2, block) + 2 * ring(8, SCALAR)


PAIRS = {
    "one": ("{{0,1}}", 64),
    "home": ("{{0,1},{1,1},{2,2}}", 64),
    "line": ("{{0,1},{1,2},{2,3}}", 192),
    "ring": ("{{0,1},{1,2},{2,3},{3,0}}", 256),
    "none": ("{{2,2}}", 0),
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_permute_counts_what_a_device_sends_on_average(pairs):
    text, mean = PAIRS[pairs]
    body = f"""  %x = bf16[128]{{0}} parameter(0)
  ROOT %y = bf16[128]{{0}} collective-permute(%x), channel_id=1, source_target_pairs={text}"""
    ledger = read_ledger(entry(body), [("pipe", 4)])
    assert ledger.complete
    assert ledger.total() == mean


def test_a_computation_of_another_core_is_read():
    """The compilers of newer chips give some computations to their sparse cores."""
    inner = """%offloaded (p: bf16[8]) -> bf16[16] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g = bf16[16]{0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}, use_global_device_ids=true, channel_id=1
}, execution_thread="sparsecore"
"""  # noqa: E501
    body = """  %x = bf16[8]{0} parameter(0)
  %start = ((bf16[8]{0}), bf16[16]{0}, u32[]) async-start(%x), async_execution_thread="sparsecore", calls=%offloaded
  %busy = bf16[8]{0} convolution(%x, %x)
  ROOT %done = bf16[16]{0} async-done(%start)"""  # noqa: E501
    ledger = read_ledger(entry(body, inner), FOUR)
    assert ledger.complete, ledger.problems
    (row,) = ledger
    assert (row.kind, row.axes, row.wire_bytes, row.overlapped) == (
        "all-gather",
        ("tensor",),
        16,
        True,
    )
    for wrong in ("}, what", "}}"):
        cut = entry(body, inner.replace('}, execution_thread="sparsecore"', wrong))
        assert not read_ledger(cut, FOUR).complete


RAGGED = """HloModule ragged, is_scheduled=true, num_partitions=8
ENTRY %main (rows: bf16[64,16], room: bf16[512,16], n: s32[8]) -> bf16[64,16] {
  %rows = bf16[64,16]{1,0} parameter(0)
  %room = bf16[512,16]{1,0} parameter(1)
  %n = s32[8]{0} parameter(2)
  %there = bf16[512,16]{1,0} ragged-all-to-all(%rows, %room, %n, %n, %n, %n), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %back = bf16[64,16]{1,0} ragged-all-to-all(%there, %rows, %n, %n, %n, %n), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}
}
"""  # noqa: E501


def test_a_ragged_exchange_sends_its_rows_and_not_the_room_for_them():
    ledger = read_ledger(RAGGED, [("data", 8)])
    assert ledger.complete
    assert [row.payload_bytes for row in ledger] == [2 * 64 * 16] * 2
    assert ledger.total("data", "ragged-all-to-all") == 2 * ring(8, 2 * 64 * 16)


def test_wire_of_one_device_is_nothing():
    assert wire_bytes("all-reduce", 1024, 1) == 0


def test_questions_about_unknown_axes_and_kinds_are_errors():
    ledger = read_ledger("ENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(1)\n}", [("data", 8)])
    with pytest.raises(ReportError, match=r"no axis 'dta'\. Did you mean 'data'\?"):
        ledger.total("dta")
    with pytest.raises(ReportError, match=r"'all_reduc'\. Did you mean 'all-reduce'\?"):
        ledger.total(kind="all_reduc")


MODULE = """HloModule m, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""
FOUR = [("data", 2), ("tensor", 2)]


def entry(body, before=""):
    return f"{MODULE}\n{before}\nENTRY %main (x: bf16[8]) -> bf16[8] {{\n{body}\n}}\n"


def test_async_pairs_count_once_and_overlap_only_compute():
    body = """  %x = bf16[8]{0} parameter(0)
  %ag = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups=[2,2]<=[4], dimensions={0}, use_global_device_ids=true, channel_id=1
  %busy = bf16[8]{0} fusion(%x), kind=kLoop, calls=%work
  %agd = bf16[16]{0} all-gather-done(%ag)
  %rs = ((bf16[16]{0}), bf16[8]{0}) reduce-scatter-start(%agd), replica_groups={{0,2},{1,3}}, dimensions={0}, to_apply=%add, use_global_device_ids=true, channel_id=2
  %copy = bf16[8]{0} copy(%busy)
  ROOT %rsd = bf16[8]{0} reduce-scatter-done(%rs)"""  # noqa: E501
    work = "%work (y: bf16[8]) -> bf16[8] {\n  %y = bf16[8]{0} parameter(0)\n  ROOT %n = bf16[8]{0} negate(%y)\n}"  # noqa: E501
    ledger = read_ledger(entry(body, work), FOUR)
    assert ledger.complete
    gather, scatter = ledger
    assert (gather.kind, gather.axes, gather.payload_bytes) == ("all-gather", ("tensor",), 32)
    assert (scatter.kind, scatter.axes, scatter.payload_bytes) == ("reduce-scatter", ("data",), 32)
    assert (gather.overlapped, scatter.overlapped) == (True, False)
    assert (gather.wire_bytes, scatter.wire_bytes) == (16, 16)
    unscheduled = read_ledger(entry(body, work).replace("is_scheduled=true, ", ""), FOUR)
    assert not any(row.overlapped for row in unscheduled)


def test_async_wrappers_and_mixed_tuples():
    body = """  %x = bf16[8]{0} parameter(0)
  %f = f32[4]{0} parameter(1)
  %start = ((bf16[8]{0}, f32[4]{0}), (bf16[8]{0}, f32[4]{0})) async-start(%x, %f), calls=%wrapped
  %busy = bf16[8]{0} custom-call(%x), custom_call_target="kernel"
  %done = (bf16[8]{0}, f32[4]{0}) async-done(%start), calls=%wrapped
  ROOT %r = bf16[8]{0} get-tuple-element(%done), index=0"""
    wrapped = """%wrapped (p: bf16[8], q: f32[4]) -> (bf16[8], f32[4]) {
  %p = bf16[8]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  ROOT %ar = (bf16[8]{0}, f32[4]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add, use_global_device_ids=true, channel_id=3
}"""  # noqa: E501
    ledger = read_ledger(entry(body, wrapped), FOUR)
    assert ledger.complete
    assert [(row.dtype, row.payload_bytes, row.overlapped) for row in ledger] == [
        ("bf16", 16, True),
        ("f32", 16, True),
    ]
    assert {row.axes for row in ledger} == {("data", "tensor")}


def test_branches_are_marked():
    body = """  %x = bf16[8]{0} parameter(0)
  %p = pred[] constant(true)
  ROOT %r = bf16[8]{0} conditional(%p, %x, %x), true_computation=%yes, false_computation=%no"""
    branches = """%yes (a.1: bf16[8]) -> bf16[8] {
  %a.1 = bf16[8]{0} parameter(0)
  ROOT %ar = bf16[8]{0} all-reduce(%a.1), replica_groups={{0,1},{2,3}}, to_apply=%add, use_global_device_ids=true
}
%no (a.2: bf16[8]) -> bf16[8] {
  ROOT %a.2 = bf16[8]{0} parameter(0)
}"""  # noqa: E501
    (row,) = read_ledger(entry(body, branches), FOUR)
    assert row.conditional
    assert row.axes == ("tensor",)
    assert (row.taken, row.wire_bytes) == (1, 16)
    assert read_ledger(entry(body, branches), FOUR).upper_bound
    told = ', metadata={op_name="jit(step)/while/body/shardkit_taken_3_1/cond"}'
    (row,) = read_ledger(entry(body + told, branches), FOUR)
    assert (row.taken, row.wire_bytes) == (0.25, 4)
    of_two = told.replace("3_1", "1_1_2")  # of a conditional that is no longer what it was
    (row,) = read_ledger(entry(body + of_two, branches), FOUR)
    assert (row.taken, row.wire_bytes) == (1, 16)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("all-reduce(", "all-reduce-twice(", "an unknown kind of collective"),
        ("{{0,1},{2,3}}", "sparse<0,1>", "replica_groups in an unknown form"),
        ("{{0,1},{2,3}}", "{{0,1},{2,7}}", "do not hold each of 4 devices once"),
        ("{{0,1},{2,3}}", "{{0,1}}", "do not hold each of 4 devices once"),
        ("{{0,1},{2,3}}", "{{0,0,1,1},{2,3}}", "do not hold each of 4 devices once"),
        ("{{0,1},{2,3}}", "mesh['a'=2] {'a'}", "do not hold each of 4 devices once"),
        ("all-reduce(%x)", "all-reduce(%y)", "operand y is not in the text"),
        ("ENTRY %main", "%main", "no ENTRY"),
        ("\n}\n", "\n", "ends inside computation main"),
    ],
)
def test_what_cannot_be_read_makes_totals_incomplete(old, new, problem):
    body = """  %x = bf16[8]{0} parameter(0)
  ROOT %r = bf16[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add, use_global_device_ids=true"""  # noqa: E501
    text = entry(body)
    assert read_ledger(text, FOUR).complete
    head, _, tail = text.rpartition(old)
    ledger = read_ledger(head + new + tail, FOUR)
    assert not ledger.complete
    assert any(problem in found for found in ledger.problems), ledger.problems


def test_loops_of_unknown_length_and_dead_collectives_are_reported():
    mesh = make_mesh(data=8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    def step(x):
        def more(state):
            return state[1] < jnp.max(state[0])

        def body(state):
            return jax.lax.psum(state[0], "data"), state[1] + 1

        return jax.lax.while_loop(more, body, (x, 0))[0]

    ledger = compiled(step, mesh, ((8,), P("data")))
    assert [row.trips for row in ledger] == [None]
    assert not ledger.complete
    assert "an unknown number of times" in ledger.problems[0]


@pytest.mark.parametrize("outer", [True, False])
def test_beside_an_unknown_loop_the_known_trips_count(outer):
    """A loop of five trips around one of unknown length, or within it."""
    mesh = make_mesh(data=8)

    def known(body, x):
        return jax.lax.fori_loop(0, 5, lambda _, x: body(x), x)

    def unknown(body, x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 100, body, x)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def step(x):
        around, within = (known, unknown) if outer else (unknown, known)
        return around(functools.partial(within, lambda x: jax.lax.psum(x, "data")), x)

    ledger = compiled(step, mesh, ((32,), P()))
    (row,) = ledger
    assert (row.trips, row.counted_trips, ledger.complete) == (None, 5, False)
    assert ledger.total() == 5 * 2 * ring(8, 4 * 32)


def test_a_program_cut_anywhere_is_never_complete():
    text = recorded("tpu_v5p_fsdp_tensor")
    mesh = [("fsdp", 4), ("tensor", 4)]
    assert read_ledger(text, mesh).complete
    body = text.index("ENTRY")
    for cut in np.linspace(1000, len(text) - 3, 12, dtype=int):
        assert not read_ledger(text[:cut], mesh).complete, cut
    assert not read_ledger(text[: body - 1], mesh).complete


def test_a_recorded_tpu_program():
    """A v5p step: derived trips, async permutes, and reduce-scatters that hide in fusions."""
    text = recorded("tpu_v5p_fsdp_tensor")
    assert "known_trip_count" not in text
    ledger = read_ledger(text, [("fsdp", 4), ("tensor", 4)])
    assert ledger.complete
    assert {row.trips for row in ledger} == {1, 4}
    scatters = ledger.where(kind="reduce-scatter")
    assert len(scatters) == text.count(" calls=%all-reduce-scatter")
    assert {(row.scope, row.phase) for row in scatters} >= {
        ("attention", "forward"),
        ("mlp", "forward"),
        ("attention", "recompute"),
    }
    permutes = ledger.where(kind="collective-permute")
    assert len(permutes) == text.count(" collective-permute-start(")
    assert all(row.overlapped and row.windowed for row in permutes)
    assert not any(row.overlapped for row in ledger if row.kind != "collective-permute")
    # bf16[8192/4, 4096] of the residual, gathered over `tensor` once in each of 4 layers.
    first = ledger.where(("tensor",), "all-gather", "forward")[0]
    assert first.operands == ("bf16[8,256,4096]",)
    assert first.payload_bytes == 2 * 8 * 1024 * 4096
    assert first.wire_bytes == 4 * 3 / 4 * first.payload_bytes
    assert ledger.total() == 8_990_351_366
    assert sum(ledger.by_axes().values()) == ledger.total()


def test_a_recorded_tpu_program_with_kernels():
    ledger = read_ledger(recorded("tpu_v5p_splash"), [("data", 2), ("tensor", 4)])
    assert ledger.complete
    layers, block = 2, 2 * 2 * 512 * 256
    assert ledger.total("tensor") == layers * 2 * ring(4, block + 3 * block)
    assert ledger.total("data") == layers * 2 * ring(2, 4 * 2 * 256 * 2 * 128)


def test_minima_of_explicit_layouts_are_met():
    """Textbook bytes from the parameters' layout are what an explicit program sends."""
    mesh = make_mesh(data=2, fsdp=4)
    specs = {"up": P(None, "fsdp"), "down": P(None, "fsdp")}

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, P(("data", "fsdp"))),
        out_specs=specs,
        check_vma=False,
    )
    def step(params, x):
        @jax.checkpoint
        def gathered(x, w):
            whole = {k: jax.lax.all_gather(v, "fsdp", axis=0, tiled=True) for k, v in w.items()}
            return layer(x, whole)

        def total(params):
            return jnp.sum(jax.lax.scan(gathered, x, params)[0] ** 2)

        return jax.lax.psum(jax.grad(total)(params), "data")

    batch = ((BATCH, WIDTH), P(("data", "fsdp")))
    made = program(step, mesh, params=weights(**specs), batch=batch)
    declared = Declarations(kinds=(strategies.data() | strategies.fsdp()).kinds)
    report = Report.of(dataclasses.replace(made, declared=declared))
    assert [(one.axis, one.ratio) for one in report.minima] == [("data", 1.0), ("fsdp", 1.0)]
    assert report.reductions == {"data": 1.0, "fsdp": 1.0}


@pytest.mark.parametrize(
    ("strategy", "known", "expected"),
    [
        (strategies.data("a"), {}, 2 * ring(8, WEIGHTS)),
        (strategies.data("a"), {"reduce_dtype": "bf16"}, ring(8, WEIGHTS)),
        (strategies.zero("a"), {}, ring(8, 2 * WEIGHTS)),
        (
            strategies.tensor("a", sequence=True),
            {"activation_bytes": 800, "layers": 2},
            8 * 2 * ring(8, 800),
        ),
        (strategies.tensor("a"), {}, None),
        (strategies.pipeline("a", micro_batches=2), {}, None),
        (  # one activation over each of 7 boundaries, each way, from 8 devices
            strategies.pipeline("a", micro_batches=2),
            {"activation_bytes": 800},
            2 * ring(8, WEIGHTS) + 2 * 7 * 800 / 8,
        ),
    ],
)
def test_minima_by_kind(strategy, known, expected):
    leaves = tuple(
        PlacedLeaf("params", Leaf(name, shape, np.dtype("float32")), spec)
        for name, (shape, spec) in weights().items()
    )
    declared = Declarations(kinds=strategy.kinds, **known)
    (kind,) = strategy.kinds
    program = Program("", (("a", 8),), "cpu", leaves=leaves, declared=declared)
    assert kind.minimum(program) == expected


@pytest.mark.parametrize("order", [("fsdp", "data"), ("data", "fsdp")])
def test_a_reduction_over_two_axes_counts_for_both(order):
    """One all-reduce over both axes is the minimum of either, where one splits the parameters."""
    mesh = make_mesh(data=2, fsdp=4)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def step(x):
        return jax.lax.psum(x, order)

    made = program(step, mesh, params=((64, 64), P()))
    ledger = read_ledger(made.hlo, made.mesh)
    over = [axis_wire_bytes(ledger, axis, made.sizes, {"fsdp"}) for axis in ("data", "fsdp")]
    assert sum(over) == ledger.total() == 2 * ring(8, 4 * 64 * 64)
    assert over == [2 * ring(2, 4 * 64 * 64 / 4), 2 * ring(4, 4 * 64 * 64)]
