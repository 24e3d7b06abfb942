"""`explain_rules`: who won, who passed and why, what did nothing, and bytes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.types import WithAxes
from shardkit.mesh import MeshSpec
from shardkit.rules import (
    REPLICATED,
    AxisRules,
    PathRules,
    explain_rules,
    first_match,
    shard_largest,
)


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "decoder": {
        "attention": {"query": WithAxes(array(64, 8, 4), ("embed", "heads", "head_dim"))},
        "mlp": [{"up": {"kernel": array(64, 256)}}, {"bias": array(7)}],
    },
    "scale": array(),
}
RULES = first_match(
    PathRules({"**/up/kernel": P(None, "tensor"), "**/upp": P("data")}),
    AxisRules({"embed": "data", "heads": "tensor", "head_dim": None, "vocab": "tensor"}),
    shard_largest("data", min_size=16),
    PathRules({"**/kernel": REPLICATED}),
)
SPEC = MeshSpec(data=2, tensor=4)


def rows(explanation):
    return {row.leaf.path: row for row in explanation.rows}


def test_each_leaf_says_who_won_and_who_passed():
    found = rows(explain_rules(RULES, PARAMS, SPEC))
    assert {path: row.spec for path, row in found.items()} == {
        "decoder/attention/query": P("data", "tensor"),
        "decoder/mlp/0/up/kernel": P(None, "tensor"),
        "decoder/mlp/1/bias": P(),
        "scale": P(),
    }
    query = found["decoder/attention/query"]
    assert query.source == "AxisRules['embed' → 'data', 'heads' → 'tensor']"
    assert query.passed == ("PathRules: no glob of 2 matches",)
    bias = found["decoder/mlp/1/bias"]
    assert (bias.source, bias.why) == (
        "shard_largest('data', min_size=16)",
        "fewer elements than min_size",
    )
    assert bias.passed[1] == "AxisRules: the leaf names no logical axes"
    assert found["scale"].source == "a scalar is replicated"


def test_entries_that_did_nothing():
    found = explain_rules(RULES, PARAMS, SPEC)
    assert found.unmatched == ('PathRules["**/upp"]', "AxisRules['vocab' → 'tensor']")
    assert found.shadowed == ('PathRules["**/kernel"]',)


def test_the_same_glob_may_win_in_one_rule_and_be_shadowed_in_the_next():
    twice = first_match(PathRules({"**": P()}), PathRules({"**": P("data")}))
    assert explain_rules(twice, {"x": array(8)}, SPEC).shadowed == ('PathRules["**"]',)


def test_bytes_are_those_of_the_shards():
    mesh = SPEC.build()
    found = explain_rules(RULES, PARAMS, mesh)
    for row in found.rows:
        shard = NamedSharding(mesh, row.spec).shard_shape(row.leaf.shape)
        assert found.bytes_per_device(row) == 4 * int(np.prod(shard))
    assert found.total_bytes == 4 * (64 * 8 * 4 + 64 * 256 + 7 + 1)
    assert found.total_bytes_per_device == 4 * (64 * 8 * 4 // 8 + 64 * 256 // 4 + 7 + 1)


def test_a_leaf_that_cannot_be_laid_out_is_a_row():
    found = explain_rules(
        PathRules({"x": P("tensor")}), {"x": array(6), "y": array(8)}, {"tensor": 4}
    )
    assert [row.spec for row in found.rows] == [None, None]
    assert found.total_bytes_per_device == 0
    text = str(found)
    assert "Cannot be laid out:" in text
    assert "dim 0 (6) is not divisible by tensor=4" in text
    assert "no rule decides it (PathRules: no glob of 1 matches" in text


def test_logical_axes_may_come_apart_from_the_arrays():
    found = explain_rules(RULES, {"w": array(64, 8)}, SPEC, axes={"w": ("embed", "heads")})
    assert found.rows[0].spec == P("data", "tensor")


def test_the_table():
    assert str(explain_rules(RULES, PARAMS, SPEC)) == (
        "4 leaves on mesh (data=2, tensor=4): 72.03 KiB in all, 17.03 KiB per device.\n"
        "parameter                type         spec                 per device  rule  passed\n"
        "decoder/attention/query  f32[64,8,4]  P('data', 'tensor')    1.00 KiB  R1    P1\n"
        "decoder/mlp/0/up/kernel  f32[64,256]  P(None, 'tensor')     16.00 KiB  R2\n"
        "decoder/mlp/1/bias       f32[7]       P()                        28 B  R3    P1 P2\n"
        "scale                    f32[]        P()                         4 B  R4\n"
        "Rules:\n"
        "  R1  AxisRules['embed' → 'data', 'heads' → 'tensor']\n"
        '  R2  PathRules["**/up/kernel"]\n'
        "  R3  shard_largest('data', min_size=16): fewer elements than min_size\n"
        "  R4  a scalar is replicated\n"
        "Passed:\n"
        "  P1  PathRules: no glob of 2 matches\n"
        "  P2  AxisRules: the leaf names no logical axes\n"
        "Matched nothing:\n"
        '  PathRules["**/upp"]\n'
        "  AxisRules['vocab' → 'tensor']\n"
        "Decided nothing, since earlier rules did:\n"
        '  PathRules["**/kernel"]'
    )


@pytest.mark.parametrize("depth", [1, 12, 40])
def test_the_table_fits_100_columns(depth):
    tree = array(2, 2, 2, 2, 2, 2, 2, 2, dtype="bfloat16")
    for level in range(depth):
        tree = {f"a_rather_long_name_{level}": tree}
    wide = PathRules({"**": P(None, ("data", "tensor"))})
    text = str(explain_rules(wide, tree, {"data": 1, "tensor": 2}))
    assert max(map(len, text.splitlines())) <= 100
    # A long path goes on in the next lines; nothing of it is cut.
    lines = text.partition("Rules:")[0].splitlines()[2:]
    assert (len(lines) > 1) == (depth > 1)
    assert lines[0].startswith("a_rath")
    path = "".join(line.split(" ")[0] for line in lines)
    assert path == "/".join(f"a_rather_long_name_{level}" for level in reversed(range(depth)))
