"""Which line of code causes a compiled cost: twelve misplaced declarations, and bad text."""

import dataclasses
import linecache
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.source import Frame, choose_source, read_line
from shardkit.report import Report
from shardkit.report.hlo._hlo import parse
from shardkit.report.hlo._source_lines import Sources

WIDTH = 128
HERE = pathlib.Path(__file__)
X = np.ones((64, WIDTH), "f")
SEQUENCES = np.ones((16, 32, WIDTH), "f")
TOKENS = np.zeros((64, 16), "i")


@dataclasses.dataclass
class Case:
    """A small step with one misplaced declaration, on the line that ends with `# <name>`."""

    loss: object
    params: dict
    rules: dict
    batch: object = dataclasses.field(default_factory=lambda: {"x": X})
    spec: object = P("data")
    activations: dict | None = None
    opt_state: object = None
    made_by: str = ""
    declared_by: str = ""
    init: object = None


def square(*names):
    return {name: (WIDTH, WIDTH) for name in names}


def constraint_on_the_wrong_dim(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    h = sk.nn.constrain(h, None, "batch")  # constraint_on_the_wrong_dim
    return jnp.mean(jnp.tanh(sk.nn.constrain(h, "batch", None)) ** 2)


def rule_that_splits_a_contraction(p, b, key):
    h = jnp.tanh(b["x"])
    h = h @ p["w"]  # rule_that_splits_a_contraction
    return jnp.mean(h**2)


def two_column_products(p, b, key):
    h = jnp.tanh(b["x"] @ p["a"])
    h = jnp.tanh(h @ p["b"])  # two_column_products
    return jnp.mean(h**2)


def nothing_after_attention(p, b, key):
    q = (b["x"] @ p["q"]).reshape(*b["x"].shape[:2], 8, -1)
    mixed = jax.nn.dot_product_attention(q, q, q)
    flat = mixed.reshape(b["x"].shape)
    return jnp.mean((flat @ p["out"]) ** 2)  # nothing_after_attention


def loss_that_gathers_logits(p, b, key):
    logits = b["x"] @ p["w"]
    logits = sk.nn.constrain(logits, "batch", None)  # loss_that_gathers_logits
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])


def sort_over_a_split_dim(p, b, key):
    h = jnp.tanh(b["x"] @ p["w"])
    h = jnp.sort(h, -1)  # sort_over_a_split_dim
    return jnp.mean(h[:, ::2] ** 2)


def batch_that_disagrees(p, b, key):
    h = jnp.tanh(b["x"]) * 2
    h = h @ p["w"]  # batch_that_disagrees
    return jnp.mean(h**2)


def table_split_by_rows(p, b, key):
    h = jnp.take(p["table"], b["tokens"], axis=0)  # table_split_by_rows
    return jnp.mean(h**2)


def shifted_rows(p, b, key):
    h = b["x"] @ p["w"]
    h = jnp.roll(h, 3, axis=0)  # shifted_rows
    return jnp.mean((h - b["x"]) ** 2)


def optimizer_on_another_layout(p, b, key):
    return jnp.mean((b["x"] @ p["w"]) ** 2)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4 * WIDTH, use_bias=False, name="up")
        down = nn.Dense(WIDTH, use_bias=False, name="down")
        h = jnp.tanh(up(x))
        return down(h)  # linen_down


def linen_down(p, b, key):
    return jnp.mean(Mlp().apply({"params": p}, b["x"]) ** 2)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.up(x))
        return self.down(h)  # nnx_down


BLOCK = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param)


def nnx_down(p, b, key):
    block = nnx.merge(BLOCK[0], p)
    return jnp.mean(block(b["x"]) ** 2)


ROWS = {"batch": "data"}
CASES = {
    "constraint_on_the_wrong_dim": Case(
        constraint_on_the_wrong_dim,
        square("w"),
        {"w": sk.REPLICATED},
        activations=ROWS,
        declared_by="the constraint at",
    ),
    "rule_that_splits_a_contraction": Case(
        rule_that_splits_a_contraction, square("w"), {"w": P("tensor", None)}
    ),
    "two_column_products": Case(two_column_products, square("a", "b"), {"*": P(None, "tensor")}),
    "nothing_after_attention": Case(
        nothing_after_attention,
        square("q", "out"),
        {"q": P(None, "tensor"), "out": P(None, "tensor")},
        {"x": SEQUENCES},
    ),
    "loss_that_gathers_logits": Case(
        loss_that_gathers_logits,
        {"w": (WIDTH, 1024)},
        {"w": P(None, "tensor")},
        activations=ROWS,
        declared_by="the constraint at",
    ),
    "sort_over_a_split_dim": Case(sort_over_a_split_dim, square("w"), {"w": P(None, "tensor")}),
    "batch_that_disagrees": Case(
        batch_that_disagrees, square("w"), {"w": P(None, "tensor")}, spec=P("tensor")
    ),
    "table_split_by_rows": Case(
        table_split_by_rows,
        {"table": (1024, WIDTH)},
        {"table": P("tensor", None)},
        {"tokens": TOKENS},
    ),
    "shifted_rows": Case(shifted_rows, square("w"), {"w": P(None, "tensor")}),
    "optimizer_on_another_layout": Case(
        optimizer_on_another_layout,
        {"w": (WIDTH, 4 * WIDTH)},
        {"w": P(None, "tensor")},
        opt_state=sk.PathRules({"**/w": P("tensor", None), "**": sk.REPLICATED}),
    ),
    "linen_down": Case(
        linen_down,
        {},
        {"up/kernel": P(None, "tensor"), "down/kernel": P(None, "tensor")},
        init=lambda key: Mlp().init(key, X)["params"],
    ),
    "nnx_down": Case(
        nnx_down,
        {},
        {"**/kernel*": P(None, "tensor"), "**": sk.REPLICATED},
        init=lambda key: nnx.split(Block(nnx.Rngs(key)), nnx.Param)[1],
    ),
}


def compile_case(case):
    def init(key):
        return {name: jax.random.normal(key, shape) for name, shape in case.params.items()}

    strategy = sk.Strategy(
        params=sk.PathRules(case.rules, allow_unmatched=True),
        batch=case.spec,
        activations=sk.AxisRules(case.activations) if case.activations else None,
        opt_state=case.opt_state,
    )
    mesh = sk.MeshSpec(data=2, tensor=4).build()
    return sk.compile_step(
        case.loss,
        optax.adam(1e-3),
        init=case.init or init,
        batch=case.batch,
        mesh=mesh,
        strategy=strategy,
    )


def line_of(name):
    text = HERE.read_text("utf-8").split("\n")
    return next((n for n, line in enumerate(text, 1) if line.endswith(f"# {name}")), None)


def avoidable(report):
    """The line that sends the most besides gradients, which any data-parallel step reduces."""
    costs = {}
    for cost in report.by_source():
        sent = sum(
            part.bytes
            for part in cost.parts
            if "rows are split" not in "".join(end.declared_by for end in part.row.ends)
        )
        costs[cost.name] = (sent, cost)
    return max(costs.values(), key=lambda one: one[0])[1]


@pytest.mark.parametrize("name", CASES)
def test_the_line_that_is_named_first_is_the_misplaced_one(name):
    case = CASES[name]
    report = compile_case(case).report()
    first = avoidable(report)
    assert sum(cost.bytes for cost in report.by_source()) == report.ledger.total()
    if line_of(name) is None:
        assert first.name == "the optimizer"
        return
    assert (first.source.file, first.source.line) == (str(HERE), line_of(name)), first.name
    assert first.source.code.endswith(f"# {name}")
    assert first.source.stack[-1].endswith(case.loss.__name__)
    declared = [end.declared_by for part in first.parts for end in part.row.ends]
    assert any(case.declared_by in text for text in declared)


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


def test_a_report_keeps_its_sources_as_json():
    report = compile_case(CASES["two_column_products"]).report()
    again = Report.from_json(report.to_json())
    assert again.by_source() == report.by_source()
    assert (again.ledger, again.peak, again.flops) == (report.ledger, report.peak, report.flops)
    assert "two_column_products" in str(report)
    assert f"test_sources.py:{line_of('two_column_products')} in" in str(report.by_source())
    flops = dict(report.flops.by_source)
    assert sum(flops.values()) == report.flops.total


def test_two_reports_are_compared_by_source_line():
    case = CASES["two_column_products"]
    before = compile_case(case).report()
    rules = {"a": P(None, "tensor"), "b": P("tensor", None)}
    after = compile_case(dataclasses.replace(case, rules=rules)).report()
    line = f"test_sources.py:{line_of('two_column_products')} in"
    (changed,) = (one for one in before.compare(after).sources if one.name.startswith(line))
    lines = {cost.name: cost.bytes for cost in before.by_source()}
    now = {cost.name: cost.bytes for cost in after.by_source()}
    assert (changed.before, changed.after) == (lines[changed.name], now[changed.name])
    assert "sent per step, by source line:" in str(before.compare(after))
    assert not before.compare(before).sources
