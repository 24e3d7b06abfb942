"""What is alive at the peak: closed forms, the compiler's own figure, and recorded programs."""

import dataclasses
import json

import pytest
from jax.sharding import PartitionSpec as P

from shardkit.report import Program, Report
from shardkit.report.hlo._hlo import parse
from shardkit.report.memory._buffer_sizes import parse_sized_type
from shardkit.report.memory._liveness import Liveness
from shardkit.report.memory._memory import read_memory
from shardkit.report.memory._peak import Peak, find_peak
from shardkit.report.memory._suggestions import suggest_memory_savings

from ._programs import LAYERS, WIDTH, make_mesh, program, recorded, rows, sgd, weights

KIB = """HloModule m, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }
%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {
  %s = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[256]{0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %wide = f32[1024]{0} broadcast(%v), metadata={op_name="jit(f)/transpose(jvp(loss))/mlp/mul"}
  %less = f32[256]{0} reduce(%wide, %i), metadata={op_name="jit(f)/transpose(jvp(loss))/mlp/add"}
  ROOT %t = (s32[], f32[256]{0}) tuple(%next, %less)
}
%test (s: (s32[], f32[256])) -> pred[] {
  %s = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %three = s32[] constant(3)
  ROOT %p = pred[] compare(%i, %three), direction=LT
}
ENTRY %main (w: f32[256], x: f32[512]) -> (f32[], f32[256]) {
  %w = f32[256]{0} parameter(0)
  %x = f32[512]{0} parameter(1)
  %zero = s32[] constant(0)
  %a = f32[512]{0} multiply(%x, %x), metadata={op_name="jit(f)/jvp(loss)/attention/mul"}
  %b = f32[512]{0} tanh(%a), metadata={op_name="jit(f)/jvp(loss)/attention/tanh"}
  %c = f32[256]{0} slice(%a), metadata={op_name="jit(f)/jvp(loss)/attention/slice"}
  %start = s32[] copy(%zero)
  %init = (s32[], f32[256]{0}) tuple(%start, %c)
  %loop = (s32[], f32[256]{0}) while(%init), condition=%test, body=%body
  %g = f32[256]{0} get-tuple-element(%loop), index=1
  %n = f32[] reduce(%b, %zero), metadata={op_name="jit(f)/transpose(jvp(loss))/reduce_sum"}
  %u = f32[256]{0} subtract(%w, %g), metadata={op_name="jit(f)/update/sub"}
  ROOT %r = (f32[], f32[256]{0}) tuple(%n, %u)
}
"""


def found(text):
    made = Program(text, (("data", 2),), "cpu")
    return find_peak(made, read_memory(made))


def test_a_loop_stays_in_place_and_its_peak_is_inside_of_it():
    peak = found(KIB)
    # In the loop: b waits (2 KiB), the state (1 KiB), the wide array (4 KiB), and the counter.
    assert (peak.phase, peak.scope) == ("backward", "mlp")
    assert peak.bytes == 2048 + 1024 + 4096 + 4
    assert peak.classes["activations"] == 2048
    assert peak.classes["gradients"] == 1024
    assert peak.scopes["attention"] >= 2048
    assert peak.largest[0].shape == "f32[1024]"


def test_a_donated_input_is_no_output():
    numbers = {one.argument for one in Liveness(parse(KIB), "cpu", frozenset()).buffers()}
    assert numbers == {None, 0, 1}
    kept = KIB.replace("input_output_alias={ {1}: (0, {}, may-alias) }", "x=1")
    outputs = [one for one in Liveness(parse(kept), "cpu", frozenset()).buffers() if one.output]
    assert sorted(one.bytes for one in outputs) == [4, 1024]


@pytest.mark.parametrize(
    ("text", "platform", "size"),
    [
        ("f32[3,100]{1,0:T(8,128)}", "tpu", 4 * 8 * 128),
        ("f32[100,3]{0,1:T(8,128)}", "tpu", 4 * 8 * 128),
        ("bf16[2,9,200]{2,1,0:T(8,128)(2,1)}", "tpu", 2 * 2 * 16 * 256),
        ("f32[]{:T(128)}", "tpu", 512),
        ("f32[3,100]{1,0}", "cpu", 1200),
        ("f32[64]{0:T(128)S(1)}", "tpu", 0),
        ("f32[64]{0:S(1)}", "gpu", 256),
    ],
)
def test_layouts_pad_and_other_memories_count_nothing(text, platform, size):
    assert parse_sized_type(text, platform).bytes == size


@pytest.fixture(scope="module")
def compiled():
    mesh = make_mesh(data=2, tensor=4)
    split = weights(P(None, None, "tensor"), P(None, "tensor", None))
    return program(sgd, mesh, donate=("params",), params=split, batch=rows(P("data"), 512, WIDTH))


def test_a_compiled_step_agrees_with_its_compiler(compiled):
    report = Report.of(compiled)
    peak = report.peak
    assert peak.agrees
    assert peak.compiler_bytes == report.memory.output + report.memory.temp
    # Three stacks wait for the backward pass: inputs, products, results of tanh.
    assert peak.classes["activations"] == 3 * 4 * LAYERS * 256 * WIDTH
    assert sum(peak.classes.values()) == sum(peak.scopes.values()) == peak.bytes
    assert "activations 72.00 KiB" in str(report)
    assert "% of the compiler's" in str(report)
    assert Report.from_json(report.to_json()) == report
    fields = json.loads(report.to_json())
    del fields["peak"]
    assert Report.from_json(json.dumps(fields)) == dataclasses.replace(report, peak=None)


def test_a_split_that_is_off_is_called_rough(compiled):
    peak = find_peak(compiled, read_memory(compiled))
    off = dataclasses.replace(peak, compiler_bytes=2 * peak.bytes)
    assert not off.agrees
    assert "ROUGH" in str(off)
    assert "50% of the compiler's" in str(off)
    assert "activations ~72.00 KiB" in str(off)
    assert "ROUGH" not in str(peak)
    assert "the compiler reports no figure" in str(dataclasses.replace(peak, compiler_bytes=None))


def test_advice_speaks_of_classes_where_they_are_known(compiled):
    memory = dataclasses.replace(read_memory(compiled), capacity=1)
    peak = find_peak(compiled, read_memory(compiled))
    said = suggest_memory_savings(memory, (), {}, peak)
    assert "a remat policy that saves less: up to 72.00 KiB of activations less" in said
    rough = suggest_memory_savings(
        memory, (), {}, dataclasses.replace(peak, compiler_bytes=2 * peak.bytes)
    )
    assert [text.partition(":")[0] for text in rough] == ["accumulate=2 or a remat policy"]


def test_without_a_schedule_nothing_is_said(compiled):
    loose = dataclasses.replace(compiled, hlo=compiled.hlo.replace("is_scheduled=true", "x=1"))
    report = Report.of(loose)
    assert report.peak is None
    assert "alive at the peak is unknown" in str(report)
    cut = dataclasses.replace(compiled, hlo=compiled.hlo[: len(compiled.hlo) // 2])
    assert Report.of(cut).peak is None


def test_an_unknown_element_type_makes_a_lower_bound():
    peak = found(KIB.replace("%b = f32[512]", "%b = q7[512]"))
    assert peak.problems == ("b has the unknown type q7[512]",)
    assert "ROUGH, a lower bound: b has the unknown type" in str(peak)


@pytest.mark.parametrize(
    ("name", "mib", "largest"),
    [
        ("gpu_h100_nano", 2.5, "f32[8,64,192]"),
        ("tpu_v5p_fsdp_tensor", 1680, "f32[8,8,1024,1024]"),
        ("tpu_v5p_splash", 3.9, "bf16[2,2,512,256]"),
    ],
)
def test_recorded_programs_are_followed_whole(name, mib, largest):
    made = Program(recorded(name), (("data", 8),), name[:3])
    peak = find_peak(made, read_memory(made))
    assert isinstance(peak, Peak)
    assert peak.problems == ()
    assert peak.bytes / 2**20 == pytest.approx(mib, rel=0.02)
    assert peak.largest[0].shape == largest
