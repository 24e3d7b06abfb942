"""The modelled step time against hand-played schedules, and on recorded TPU programs."""

import re

import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.errors import ReportError
from shardkit.hardware import CHIPS
from shardkit.report import Program, Report, count_flops, model_time, read_ledger
from shardkit.report.communication._links import Links
from shardkit.report.hlo._hlo import parse
from shardkit.report.hlo._trips import TripCounts
from shardkit.report.time._traffic import step_traffic

from ._programs import BATCH, HIDDEN, WIDTH, make_mesh, program, recorded, rows, sgd, weights

V5P = CHIPS["v5p"]
MESH = (("fsdp", 4), ("tensor", 4))
RECORDED = {"tpu_v5p_fsdp_tensor": MESH, "tpu_v5p_splash": (("data", 2), ("tensor", 4))}
HEAD = "HloModule m, is_scheduled=true, num_partitions=4\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

"""
PIECE = 2**20
X = f"f32[{PIECE}]{{0}}"
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


def work(name, operand, cycles):
    meta = 'metadata={op_name="jit(step)/jvp(loss)/mlp/tanh"}'
    return f'  %{name} = {X} tanh(%{operand}), {meta}, backend_config={{"estimated_cycles":"{cycles}"}}\n'  # noqa: E501


def permute(name, operand):
    return f"  %{name} = ({X}, {X}) collective-permute-start(%{operand}), {RING}\n"


def done(name, start):
    return f"  %{name} = {X} collective-permute-done(%{start})\n"


def all_reduce(name, operand):
    groups = "replica_groups={{0,1,2,3}}, channel_id=1, use_global_device_ids=true"
    return f"  %{name} = {X} all-reduce(%{operand}), {groups}, to_apply=%add\n"


def main(*body, root="  ROOT %r = f32[4] constant(0)\n"):
    lines = "".join(body)
    return f"{HEAD}{ADD}ENTRY %main (x: f32[8]) -> f32[4] {{\n  %x = {X} parameter(0)\n{lines}{root}}}\n"  # noqa: E501


def played(text, mesh=(("ring", 4),), kind="TPU v5p", **fields):
    made = Program(text, mesh, "tpu", kind, **fields)
    return model_time(made, read_ledger(text, mesh), None)


def seconds(cycles):
    return cycles / V5P.clock


HOP = V5P.latency + 4 * PIECE / V5P.link
REDUCE = 6 * V5P.latency + 2 * 3 / 4 * 4 * PIECE / (2 * V5P.link)


def test_compute_is_estimated_cycles_at_the_chips_clock():
    timeline = played(main(work("a", "x", 1000), work("b", "a", 500)))
    assert timeline.high == timeline.low == pytest.approx(seconds(1500))
    assert timeline.label == "modelled"
    assert timeline.segments[0].scope == "mlp"
    assert timeline.segments[0].phase == "forward"
    assert timeline.problems == ()


def test_a_synchronous_collective_is_exposed_whole():
    timeline = played(main(work("a", "x", 1000), all_reduce("b", "a")))
    assert timeline.exposed == pytest.approx(REDUCE)
    assert timeline.communication == {"ring": pytest.approx(REDUCE)}
    assert timeline.high == pytest.approx(seconds(1000) + REDUCE)


@pytest.mark.parametrize("cycles", [10, 200_000])
def test_a_transfer_hides_behind_the_compute_before_its_end(cycles):
    text = main(permute("s", "x"), work("a", "x", cycles), done("d", "s"), work("b", "d", 7))
    timeline = played(text)
    exposed = max(0.0, HOP - seconds(cycles))
    assert (cycles == 10) == (exposed > 0)
    assert timeline.exposed == pytest.approx(exposed)
    assert timeline.high == pytest.approx(seconds(cycles + 7) + exposed)
    assert timeline.communication == {"ring": pytest.approx(HOP)}


def test_two_permutes_go_round_both_ways_and_a_third_waits():
    starts = [permute(f"s{i}", "x") for i in range(3)]
    two = played(main(*starts[:2], done("d0", "s0"), done("d1", "s1")))
    assert two.exposed == pytest.approx(HOP)
    three = played(main(*starts, done("d0", "s0"), done("d1", "s1"), done("d2", "s2")))
    assert three.exposed == pytest.approx(2 * HOP)


def loop(trips, *body):
    state = f"(s32[], {X})"
    return f"""{HEAD}{ADD}%body (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = {X} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
{"".join(body)}  ROOT %t = {state} tuple(%next, %x)
}}

%cond (p: {state}) -> pred[] {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant({trips})
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: {X}) -> {state} {{
  %x = {X} parameter(0)
  %zero = s32[] constant(0)
  %t = {state} tuple(%zero, %x)
  ROOT %w = {state} while(%t), condition=%cond, body=%body
}}
"""


def test_a_loop_takes_its_trips():
    once = [work("a", "x", 1000), all_reduce("b", "a")]
    timeline = played(loop(12, *once))
    assert timeline.high == pytest.approx(12 * (seconds(1000) + REDUCE))
    assert timeline.exposed == pytest.approx(12 * REDUCE)
    unknown = played(loop(12, *once).replace("direction=LT", "direction=XX"))
    assert unknown.high == pytest.approx(seconds(1000) + REDUCE)
    assert any("an unknown number of times" in text for text in unknown.problems)


def test_an_operation_without_an_estimate_counts_as_its_traffic_and_is_named():
    text = main(work("a", "x", 1000), f"  %tail.3 = {X} sort(%a)\n")
    timeline = played(text)
    traffic = 2 * 4 * PIECE / V5P.memory_bandwidth
    assert timeline.compute == pytest.approx(seconds(1000) + traffic)
    assert "1 of 2 operations have no estimate (tail)" in " ".join(timeline.assumptions)
    kernel = f'  %splash.1 = {X} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    timeline = played(main(work("a", "x", 1000), kernel))
    assert timeline.problems == (
        "1 kernel without an estimate (splash): only their memory traffic counts",
    )


def test_axes_that_cross_slices_or_leave_an_nvlink_domain_go_over_the_network():
    assert Links(V5P, MESH).bandwidth(["fsdp"]) == 2 * V5P.link
    assert Links(V5P, MESH).bandwidth(["fsdp", "tensor"]) == 4 * V5P.link
    two = Links(CHIPS["h100"], MESH, ("fsdp",))
    assert two.bandwidth(["fsdp", "tensor"]) == CHIPS["h100"].network
    gpu = Links(CHIPS["h100"], (("data", 4), ("tensor", 8)))
    assert gpu.bandwidth(["tensor"]) == CHIPS["h100"].link
    assert gpu.bandwidth(["data"]) == CHIPS["h100"].network


def test_the_recorded_program_is_its_cycles_and_its_ledger():
    """Compute is every estimate × trips; communication every row of the ledger on its ring."""
    text = recorded("tpu_v5p_fsdp_tensor")
    timeline = played(text, MESH)
    module = parse(text)
    loops, cycles = TripCounts(module), 0
    bodies = {
        dict(one.calls)["body"]: loops.trips(module.entry, one.name)
        for one in module.computations[module.entry].instructions.values()
        if one.opcode == "while"
    }
    for name, trips in {module.entry: 1, **bodies}.items():
        for one in module.computations[name].instructions.values():
            cycles += trips * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', one.rest)))
    assert cycles == 112_956_048
    assert seconds(cycles) <= timeline.compute <= 1.02 * seconds(cycles)
    links = Links(V5P, MESH)
    wire = sum(links.seconds(row) * row.trips for row in read_ledger(text, MESH))
    assert sum(timeline.communication.values()) == pytest.approx(wire)
    assert timeline.high == pytest.approx(timeline.compute + timeline.exposed)
    synchronous = sum(
        links.seconds(row) * row.trips
        for row in read_ledger(text, MESH)
        if row.kind != "collective-permute"
    )
    assert synchronous <= timeline.exposed < wire
    assert timeline.problems == ()


def test_kernels_make_the_recorded_program_a_lower_bound():
    timeline = played(recorded("tpu_v5p_splash"), RECORDED["tpu_v5p_splash"])
    assert timeline.problems[0].startswith(
        "4 kernels without an estimate (splash_mha_fwd_residuals"
    )
    assert "lower bound: 4 kernels" in str(timeline)


def test_a_schedule_that_misses_a_collective_says_so():
    text = main(work("a", "x", 10))
    ledger = read_ledger(main(all_reduce("b", "x")), (("ring", 4),))
    timeline = model_time(Program(text, (("ring", 4),), "tpu", "TPU v5p"), ledger, None)
    assert "1 collective in no schedule: their time is missing" in timeline.problems


@pytest.fixture(scope="module")
def made():
    return program(sgd, make_mesh(data=8), params=weights(), batch=rows(P("data")))


def test_simulated_devices_have_no_time_unless_a_chip_is_given(made):
    report = Report.of(made)
    assert report.timeline is None
    assert "Time per step: not modelled, cpu is not in the hardware table." in str(report)
    assert Report.of(made, chip="h100").timeline.chip == "h100"
    with pytest.raises(ReportError, match=r"'h10'  is not in the.*Did you mean 'h100'\?"):
        Report.of(made, chip="h10")


def test_a_roofline_has_two_ends(made):
    chip, flops = CHIPS["h100"], count_flops(made.jaxpr)
    timeline = Report.of(made, chip="h100").timeline
    assert timeline.source == "roofline"
    products = flops.total / 8 / chip.flops["bf16"]
    wire = sum(
        Links(chip, made.mesh).seconds(r) * r.trips for r in read_ledger(made.hlo, made.mesh)
    )
    assert timeline.products == timeline.compute == pytest.approx(products)
    assert timeline.low == pytest.approx(max(products, timeline.memory, wire))
    assert timeline.high == pytest.approx(products + timeline.memory + wire)
    assert timeline.mfu == pytest.approx(flops.model / 8 / chip.flops["bf16"] / timeline.high)
    assert timeline.mfu < timeline.best_mfu


def test_traffic_reads_slices_and_writes_updates():
    text = (
        HEAD
        + """%sliced (p: f32[8,64], i: s32[]) -> f32[64] {
  %p = f32[8,64] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,64] dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}
  ROOT %r = f32[64] bitcast(%s)
}

%updated (p: f32[8,64], u: f32[1,64], i: s32[]) -> f32[8,64] {
  %p = f32[8,64] parameter(0)
  %u = f32[1,64] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %r = f32[8,64] dynamic-update-slice(%p, %u, %i, %z)
}

ENTRY %main (p: f32[8,64], i: s32[], u: f32[1,64]) -> f32[64] {
  %p = f32[8,64] parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,64] parameter(2)
  %s = f32[64] fusion(%p, %i), kind=kLoop, calls=%sliced
  %w = f32[8,64] fusion(%p, %u, %i), kind=kLoop, calls=%updated
  ROOT %t = f32[64] tanh(%s)
}
"""
    )
    row = 4 * 64
    module = parse(text)
    assert step_traffic(module, TripCounts(module)) == (
        (row + 4 + row) + (row + 4 + row) + 2 * row,
        (),
    )


def test_traffic_of_a_compiled_product():
    def product(w, x):
        return x @ w

    made = program(
        product, make_mesh(data=1), params=((WIDTH, HIDDEN), P()), batch=((BATCH, WIDTH), P())
    )
    module = parse(made.hlo)
    least = 4 * (WIDTH * HIDDEN + BATCH * WIDTH + BATCH * HIDDEN)
    assert least <= step_traffic(module, TripCounts(module))[0] <= 2 * least


@pytest.mark.parametrize("name", RECORDED)
def test_a_timeline_survives_json_and_fits_100_columns(name):
    report = Report.of(Program(recorded(name), RECORDED[name], "tpu", "TPU v5p"))
    assert Report.from_json(report.to_json()) == report
    assert max(map(len, str(report.timeline).splitlines())) <= 100
    assert str(report.timeline) in str(report)
