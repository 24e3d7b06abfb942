"""Texts of large programs are read in time and memory that grow as they do."""

import time
import tracemalloc

import pytest

from shardkit.report import Program, Report

HEAD = """HloModule step, is_scheduled=true, num_partitions=2

FileNames
1 "/home/me/model.py"

FunctionNames
1 "layer"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main (x: f32[64,64]) -> f32[64,64] {
  %y.0 = f32[64,64]{1,0} parameter(0)
"""
GATHER = (
    "  %s.{i} = (f32[32,64]{{1,0}}, f32[64,64]{{1,0}}) all-gather-start(%h.{i}), channel_id={i}, "
    "replica_groups={{{{0,1}}}}, dimensions={{0}}, use_global_device_ids=true, {meta}\n"
    '  %m.{i} = f32[64,64]{{1,0}} custom-call(%y.{last}), custom_call_target="product", {meta}\n'
    "  %d.{i} = f32[64,64]{{1,0}} all-gather-done(%s.{i}), {meta}\n"
    "  %y.{i} = f32[64,64]{{1,0}} add(%m.{i}, %d.{i}), {meta}\n"
)


def text_of(layers):
    """A program that gathers half of an array for each layer, behind a product."""
    lines = [HEAD]
    for i in range(1, layers + 1):
        meta = f'metadata={{op_name="jit(step)/jvp(loss)/layer_{i}/mul" stack_frame_id=1}}'
        half = f"  %h.{i} = f32[32,64]{{1,0}} slice(%y.{i - 1}), slice={{[0:32], [0:64]}}, {meta}\n"
        lines.append(half + GATHER.format(i=i, last=i - 1, meta=meta))
    lines.append(f"  ROOT %out = f32[64,64]{{1,0}} copy(%y.{layers})\n}}\n")
    return "".join(lines)


def cost(layers):
    """Processor seconds and peak bytes of reading a program, and its report."""
    text = text_of(layers)
    start = time.process_time()
    report = Report.of(Program(text, (("data", 2),), "gpu"))
    seconds = time.process_time() - start
    tracemalloc.start()
    Report.of(Program(text, (("data", 2),), "gpu"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak, report


@pytest.mark.slow
def test_twice_the_text_takes_twice_the_time_and_memory():
    small, large = cost(200), cost(800)
    assert large[0] < 8 * small[0]  # 16 times for what is read once per collective
    assert large[1] < 8 * small[1]
    report = large[2]
    assert report.ledger.complete
    assert len(report.ledger) == 800
    assert all(row.overlapped for row in report.ledger)
    ((one),) = report.by_source()
    assert (one.name, one.bytes) == ("model.py:42 in layer", 800 * 4 * 32 * 64)


def test_a_large_program_that_is_cut_off_says_what_is_missing():
    text = text_of(200)
    report = Report.of(Program(text[: len(text) // 2], (("data", 2),), "gpu"))
    assert not report.ledger.complete
    assert any("the text ends" in problem for problem in report.ledger.problems)
    assert "Incomplete" in str(report) or "at least" in str(report)
