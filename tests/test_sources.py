"""Which line of code causes a compiled cost: misplaced declarations, and bad text."""

import dataclasses
import importlib.util
import json
import linecache
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.source import Frame, choose_source, read_line
from shardkit._core.tree import Leaf, format_bytes
from shardkit.report import PlacedLeaf, Report, find_batch_axes
from shardkit.report._by_source import group_by_source
from shardkit.report.hlo._hlo import parse
from shardkit.report.hlo._source_lines import Sources
from shardkit.targets import StepSource, compile_for

from ._misplaced import CASES, STRANGERS, avoidable, declare, line_of
from ._misplaced_among import AMONG
from ._misplaced_constraints import BESIDE, CONSTRAINTS
from ._misplaced_models import BESIDE_PRODUCTS, MODELS
from ._misplaced_rules import ODD as RULES
from ._misplaced_stored import RIGHT, STORED, SWAPPED
from ._misplaced_two import TWO
from ._quick import some_quick

LIBTPU = importlib.util.find_spec("libtpu") is not None
# The TPU compiler needs seconds for each: six of those in a model, or by a constraint.
ON_TPU = """constraint_on_the_wrong_dim two_column_products nothing_after_attention
    loss_that_gathers_logits linen_down nnx_down""".split()
WITHOUT_FRAMES = ("linen_scan_constraint", "constraint_in_a_derivative_rule", "nnx_scan")
ALL = CASES | STRANGERS | MODELS | CONSTRAINTS
ODD = RULES | AMONG | STORED


def compile_case(name, **changes):
    spec, mesh = declare(name, ALL[name])
    return spec.replace(**changes).compile(mesh.build())


def check_source(name, report):
    """That the line named first, and that of the first finding, is the misplaced one."""
    first, true = avoidable(report), line_of(name)
    assert sum(cost.bytes for cost in report.by_source()) == report.ledger.total()
    sent = [finding for finding in report.findings if finding.rows]
    assert all(finding.alternatives for finding in sent)  # each fix is code that can be tried
    if true is None:
        assert first.name == "the optimizer"
        return sent
    if sent:
        assert sent[0].source.code.endswith(f"# {name}")
    if sent:  # also where sums that are right send more
        lines = report.by_source()
        assert (lines[0].source.file, lines[0].source.line) == true, lines[0].name
        assert 0 < lines[0].in_findings <= lines[0].bytes
    if name in (*BESIDE_PRODUCTS, *BESIDE):
        return sent
    assert (first.source.file, first.source.line) == true, first.name
    assert first.source.code.endswith(f"# {name}")
    loss = getattr(ALL[name].loss, "train", ALL[name].loss).__name__
    # A loop of a library, and a derivative rule, are traced without the frames around them.
    assert loss in first.source.stack[-1] or name in WITHOUT_FRAMES
    declared = [end.declared_by for part in first.parts for end in part.row.ends]
    assert any(ALL[name].declared_by in text for text in declared)
    return sent


# All but two thirds of those that came after the first twelve.
QUICK = [*CASES, *list(STRANGERS | MODELS | CONSTRAINTS)[::3]]


@pytest.mark.parametrize("name", some_quick(ALL, *QUICK))
def test_the_line_that_is_named_first_is_the_misplaced_one(name):
    if name in ("vmapped_linear", "equinox_output"):
        pytest.importorskip("equinox")
    sent = check_source(name, compile_case(name).report())
    # Sums over a split contraction of equal dims, and tables split by rows, are right where a pair
    # of products or a vocabulary is; shifted rows send less than a kilobyte.
    case = ALL[name]
    expected = case.finding if jax.__version__.startswith("0.10.") else case.later or case.finding
    assert (sent[0].kind if sent else "") == expected


@pytest.mark.parametrize("name", some_quick(ODD, *list(ODD)[::3]))
def test_a_declaration_at_odds_with_all_others_is_named_with_the_layout_that_ends_it(name):
    """The layout is compiled, as the fix says and as it is written by hand: both send the same."""
    odd = ODD[name]
    spec, mesh = declare(name, odd.misplaced)
    report = spec.compile(mesh.build()).report(try_fixes=True)
    first, lines = report.findings[0], report.by_source()
    assert (first.kind, first.source.code.split("# ")[-1]) == (odd.misplaced.finding, name)
    assert (lines[0].source.file, lines[0].source.line) == (first.source.file, first.source.line)
    assert any(odd.misplaced.declared_by in why for _, _, why in lines[0].part_cells())
    assert first.fix.startswith(odd.fix)
    spec, mesh = declare(name, dataclasses.replace(odd.misplaced, **odd.mended))
    after = spec.compile(mesh.build()).report()
    assert first.remaining == after.ledger.total() < report.ledger.total()
    assert not any(odd.misplaced.finding == one.kind for one in after.findings)


@pytest.mark.parametrize("name", RIGHT)
def test_what_agrees_is_not_blamed(name):
    spec, mesh = declare("", RIGHT[name].misplaced)
    findings = spec.compile(mesh.build()).report().findings
    assert not any(one.declarations or one.kind == "split_contraction" for one in findings)


def test_a_pair_that_sums_what_it_widens_is_split_the_other_way_round():
    spec, mesh = declare("", SWAPPED.misplaced)
    report = spec.compile(mesh.build()).report(try_fixes=True)
    finding = report.findings[0]
    assert (finding.kind, finding.fix[: len(SWAPPED.fix)]) == ("split_contraction", SWAPPED.fix)
    spec, mesh = declare("", dataclasses.replace(SWAPPED.misplaced, **SWAPPED.mended))
    after = spec.compile(mesh.build()).report().ledger.total()
    assert finding.remaining == after < 0.7 * report.ledger.total()


@pytest.mark.parametrize("name", some_quick(TWO, *list(TWO)[::3]))
def test_two_misplaced_declarations_are_told_apart(name):
    """Each has a finding of its own, and both layouts are compiled, one by one and together.

    Of a layout that sends no less, also beside that of the other, the finding is kept apart.
    """
    pair = TWO[name]
    spec, mesh = declare("", pair.both)
    report = spec.compile(mesh.build()).report(try_fixes=True)
    mended = [one for one in report.findings if one.declarations]
    found = [*mended, *(one for one in report.kept if one.declarations)]
    named = [tuple(re.sub(r":\d+ in .*", "", text) for text in one.declarations) for one in found]
    assert tuple(named) == pair.declarations
    assert [*report.findings[: len(mended)]] == mended  # before all others
    assert [one.bytes for one in found] == sorted((one.bytes for one in found), reverse=True)
    assert len({row for one in found for row in one.rows}) == sum(len(one.rows) for one in found)
    spec, mesh = declare("", dataclasses.replace(pair.both, **pair.mended))
    after = spec.compile(mesh.build()).report()
    together = f"; with those of all such findings {format_bytes(after.ledger.total())}"
    if len(mended) > 1:
        assert all(together in one.fix for one in mended)
    elif len(found) == 1:
        assert found[0].remaining == after.ledger.total()
    assert (after.ledger.total() < report.ledger.total()) == pair.less == bool(mended)
    assert all("keep it as it is" in one.fix for one in report.kept)


def test_a_constraint_of_a_backward_rule_is_said_to_be_one():
    """JAX gives all that a backward rule computes the line of the call."""

    @jax.custom_vjp
    def activate(x):
        return jnp.tanh(x)

    def backward(x, g):
        g = jax.lax.with_sharding_constraint(g, P("data", "tensor", None))
        return (g * (1 - jnp.tanh(x) ** 2),)

    activate.defvjp(lambda x: (activate(x), x), backward)

    def loss(p, b, key):
        h = activate(b["x"] @ p["up"])  # the call
        return jnp.mean((h @ p["down"]) ** 2)

    odd = RULES["inputs_by_length"]
    case = dataclasses.replace(odd.misplaced, loss=loss, spec=P("data"))
    spec, mesh = declare("", case)
    finding, *_ = spec.compile(mesh.build()).report(try_fixes=True).findings
    assert finding.source.code.endswith("# the call")
    assert finding.source.function.startswith("a backward rule called by ")
    assert f"P('data', None, 'tensor') in the constraint at {finding.source}" in finding.fix
    assert finding.remaining is None


@pytest.mark.parametrize(
    ("specs", "params", "rows"),
    [
        ({"x": P("data"), "y": P("tensor")}, P("tensor"), {"data"}),
        ({"x": P("data"), "y": P("tensor"), "z": P("data")}, P(), {"data"}),
        ({"x": P("data"), "y": P("tensor")}, P(), {"data", "tensor"}),
        ({"x": P(("data", "tensor")), "y": P("data")}, P("tensor"), {"data", "tensor"}),
    ],
)
def test_axes_of_rows_where_leaves_of_the_batch_disagree(specs, params, rows):
    leaf = Leaf("w", (8, 8), jnp.float32)
    leaves = [PlacedLeaf("batch", leaf, spec) for spec in specs.values()]
    assert find_batch_axes([PlacedLeaf("params", leaf, params), *leaves], (), ()) == rows


def test_lines_of_findings_come_first_in_every_form():
    """The product's sum over tensor is right, and sends more than the gather by the constraint."""
    report = compile_case("norm_by_columns").report()
    lines = report.by_source()
    assert lines[1].bytes > lines[0].bytes
    named = sum(finding.bytes for finding in report.findings)
    assert sum(line.in_findings for line in lines) == pytest.approx(named, abs=len(lines))
    assert " in findings  _misplaced_constraints.py" in str(lines).split("\n\n")[1]
    assert "in findings" in lines._repr_html_()
    written = json.loads(report.to_json())["by_source"]
    assert [(line["name"], line["in_findings"]) for line in written] == [
        (line.name, line.in_findings) for line in lines
    ]


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs the extra [tpu]")
@pytest.mark.parametrize("name", ON_TPU)
def test_the_line_that_is_named_first_is_the_misplaced_one_for_a_tpu(name):
    source = StepSource("tests._misplaced:declare", arguments={"name": name})
    report = compile_for(source, "tpu:v5e:2x4")
    assert report.platform == "tpu"
    assert check_source(name, report)  # the finding may be of another kind


TABLES = """HloModule jit_step, num_partitions=2

FileNames
1 "/home/me/model.py"
2 "/opt/site-packages/optax/update.py"
3 "/home/me/a \\"quoted\\" name.py"

FunctionNames
1 "attend"
2 "loss"
3 "update"

FileLocations
1 {file_name_id=1 function_name_id=2 line=80 end_line=80 column=4 end_column=9}
2 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}
3 {file_name_id=2 function_name_id=3 line=7 end_line=7 column=4 end_column=9}
4 {file_name_id=3 function_name_id=1 line=9}

StackFrames
1 {file_location_id=1 parent_frame_id=%(first)d}
2 {file_location_id=2 parent_frame_id=%(second)d}
3 {file_location_id=3 parent_frame_id=%(first)d}
4 {file_location_id=4 parent_frame_id=%(second)d}

ENTRY %%main (x: f32[4]) -> (f32[4], f32[8]) {
  %%x = f32[4]{0} parameter(0)
  %%y = f32[4]{0} multiply(%%x, %%x), metadata={op_name="jit(step)/jvp(loss)/mul" stack_frame_id=2}
  %%z = f32[8]{0} concatenate(%%y, %%x), dimensions={0}, metadata={stack_frame_id=%(other)d}
  %%ar = (f32[4]{0}, f32[8]{0}) all-reduce(%%y, %%z), channel_id=1, \
  replica_groups={{0,1}}, use_global_device_ids=true, to_apply=%%add, metadata={stack_frame_id=2}
  %%a = f32[4]{0} get-tuple-element(%%ar), index=0, metadata={stack_frame_id=2}
  %%b = f32[8]{0} get-tuple-element(%%ar), index=1, metadata={stack_frame_id=%(other)d}
  ROOT %%t = (f32[4]{0}, f32[8]{0}) tuple(%%a, %%b)
}
"""


def sources_of(text):
    module = parse(text)
    here = module.computations["main"]
    return Sources(text, module), here, here.instructions


def test_text_without_lines_says_that_none_is_named():
    bare = TABLES % {"first": 1, "second": 2, "other": 4}
    bare = bare[: bare.index("FileNames")] + bare[bare.index("ENTRY") :]
    text = str(group_by_source(sk.report.read_ledger(bare, [("data", 2)])))
    assert "unknown  (the compiled program names no line of your code for these)" in text


@pytest.mark.parametrize(("first", "second"), [(1, 2), (0, 1)], ids=["from one", "from zero"])
def test_a_combined_collective_names_the_line_of_each_part(first, second):
    text = TABLES % {"first": first, "second": second, "other": 4}
    sources, here, named = sources_of(text)
    one, two = sources.of_operands(named["ar"], here)
    assert (str(one), str(two)) == ("model.py:42 in attend", 'a \\"quoted\\" name.py:9 in attend')
    assert one.stack == ("/home/me/model.py:42 in attend", "/home/me/model.py:80 in loss")
    report = sk.report.read_ledger(text, [("data", 2)])
    assert report[0].sources == (one, two)
    assert report[0].source == two  # the largest array's


def test_a_program_traced_without_stacks_has_its_paths_in_the_table_of_functions():
    text = (TABLES % {"first": 0, "second": 0, "other": 4}).replace(
        '"attend"', '"jit(step)/transpose(jvp(loss))/attend"'
    )
    whole = "jit(step)/jvp(loss)/mul"
    (row,) = sk.report.read_ledger(text.replace(whole, "mul"), [("data", 2)])
    assert (row.phase, row.scope) == ("backward", "attend")
    assert str(row.sources[0]) == "model.py:42 in ?"
    bare = TABLES % {"first": 1, "second": 2, "other": 4}
    assert sk.report.restore_paths(bare) == bare


def test_what_a_library_computes_has_the_line_that_calls_it_or_none():
    sources, here, named = sources_of(TABLES % {"first": 1, "second": 2, "other": 3})
    # The frame of optax has no caller in the user's files but line 80's, which is not its parent.
    assert sources.of(named["b"], here) is None
    sources, here, named = sources_of(TABLES % {"first": 0, "second": 1, "other": 3})
    assert sources.of(named["b"], here) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('source_file="/home/me/model.py" source_line=3', "model.py:3 in ?"),
        ("stack_frame_id=77", "None"),
        ('op_name="jit(f)/mul"', "None"),
        ("", "None"),
    ],
)
def test_text_without_tables(text, expected):
    program = f"""HloModule m, num_partitions=2

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} multiply(%x, %x), metadata={{{text}}}
}}
"""
    sources, here, named = sources_of(program)
    assert str(sources.of(named["y"], here)) == expected


PACKAGE = pathlib.Path(sk.__file__).parent


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["/usr/site-packages/flax/linen/linear.py", "/home/me/a.py", "/home/me/b.py"], 1),
        (["/usr/site-packages/transformers/llama.py", "/home/me/a.py"], 1),
        (["/usr/site-packages/transformers/llama.py"], 0),
        ([f"{PACKAGE}/lm/_block.py", "/home/me/a.py"], 1),
        ([f"{PACKAGE}/nn/_dot.py", f"{PACKAGE}/lm/_block.py"], 1),
        ([f"{PACKAGE}/nn/_dot.py", "<frozen runpy>", "<string>"], None),
        (["<ipython-input-3-abc>", "/home/me/a.py"], 0),
        (
            ["/usr/site-packages/optax/a.py", f"{PACKAGE}/step/_update.py", "/home/me/train.py"],
            None,
        ),
        ([], None),
    ],
)
def test_the_frame_that_is_chosen(files, expected):
    chosen = choose_source(Frame(file, 7, "f") for file in files)
    assert (chosen and chosen.file) == (files[expected] if expected is not None else None)


def test_a_file_that_is_gone_or_has_changed_has_no_code(tmp_path, monkeypatch):
    module = tmp_path / "shown_model.py"
    module.write_text("x = 1\ny = 2\n")
    os.utime(module, (1e9, 1e9))
    monkeypatch.syspath_prepend(str(tmp_path))
    import shown_model

    assert read_line(shown_model.__file__, 2) == "y = 2"
    module.write_text("# a new line\nx = 1\ny = 2\n")
    linecache.clearcache()
    assert read_line(str(module), 2) == ""
    module.unlink()
    linecache.clearcache()
    assert read_line(str(module), 2) == ""


def test_a_line_without_code_says_why():
    report = compile_case("shifted_rows").report()
    gone = dataclasses.replace(report.ledger[0].source, code="")
    rows = tuple(dataclasses.replace(row, sources=(gone,)) for row in report.ledger[:1])
    lines = group_by_source(dataclasses.replace(report.ledger, rows=rows))
    said = "(the file is not at hand, or has changed since it was imported)"
    assert f"{gone}  {said}" in " ".join(str(lines).split("\n"))
    assert said in lines._repr_html_()


def test_a_report_keeps_its_sources_as_json():
    report = compile_case("two_column_products").report()
    again = Report.from_json(report.to_json())
    assert again.by_source() == report.by_source()
    assert (again.ledger, again.peak, again.flops) == (report.ledger, report.peak, report.flops)
    assert "two_column_products" in str(report)
    assert f"_misplaced.py:{line_of('two_column_products')[1]} in" in str(report.by_source())
    flops = dict(report.flops.by_source)
    assert sum(flops.values()) == report.flops.total
    ((source, number), *_) = report.flops.by_source
    assert f"{source}  {number:.4g}  " in str(again)


def test_what_a_loop_over_layers_saves_has_the_line_that_computes_it():
    """The update of the stack that it is saved in has the line of the loop."""

    def loss(p, b, key):
        def layer(x, w):
            h = jnp.tanh(x @ w)  # the hidden state
            return jnp.sin(h), None  # the result

        return jnp.mean(jax.lax.scan(layer, b["x"], p["w"])[0])

    report = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, 64, 64))},
        batch={"x": jnp.ones((1024, 64))},
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.strategies.data(),
    ).report()
    saved = [one for one in report.peak.largest if one.shape == "f32[4,128,64]"]
    lines = {one.source.code for one in saved if one.kind == "activations"}
    assert any(line.endswith(("# the hidden state", "# the result")) for line in lines)
    assert report.peak.agrees


def test_two_reports_are_compared_by_source_line():
    before = compile_case("two_column_products").report()
    rules = sk.PathRules({"a": P(None, "tensor"), "b": P("tensor", None)})
    strategy = dataclasses.replace(declare("two_column_products")[0].strategy, params=rules)
    after = compile_case("two_column_products", strategy=strategy).report()
    line = f"_misplaced.py:{line_of('two_column_products')[1]} in"
    (changed,) = (one for one in before.compare(after).sources if one.name.startswith(line))
    lines = {cost.name: cost.bytes for cost in before.by_source()}
    now = {cost.name: cost.bytes for cost in after.by_source()}
    assert (changed.before, changed.after) == (lines[changed.name], now[changed.name])
    assert "sent per step, by source line:" in str(before.compare(after))
    assert not before.compare(before).sources
