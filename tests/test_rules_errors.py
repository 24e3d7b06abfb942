"""Every mistake in a declaration of rules has its own words, and all come at once."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.errors import ShardingError
from shardkit._core.tree import Leaf
from shardkit.rules import (
    REPLICATED,
    AxisRules,
    PathRules,
    check_batch,
    check_spec,
    first_match,
    resolve,
    resolve_all,
    shard_largest,
)

F32 = np.dtype("float32")


def leaf(path, *shape, axes=None):
    return Leaf(path, shape, F32, axes)


def message(rule, leaves, **mesh):
    with pytest.raises(ShardingError) as error:
        resolve(rule, leaves, mesh)
    return str(error.value)


def test_indivisible_dims_share_one_fix():
    rules = first_match(
        PathRules({"**/up/kernel": P(None, "tensor")}),
        AxisRules({"embed": None, "heads": "tensor", "head_dim": None}),
    )
    leaves = [
        leaf("decoder/mlp/up/kernel", 1024, 4096),
        leaf("decoder/attn/query/kernel", 1024, 16, 64, axes=("embed", "heads", "head_dim")),
    ]
    assert message(rules, leaves, data=2, tensor=3) == (
        "2 parameters cannot be laid out on mesh (data=2, tensor=3).\n"
        "  decoder/mlp/up/kernel f32[1024,4096]       "
        "PathRules[\"**/up/kernel\"] → P(None, 'tensor'):"
        " dim 1 (4096) is not divisible by tensor=3 (4095 or 4098 would be)\n"
        "  decoder/attn/query/kernel f32[1024,16,64]  AxisRules['heads' → 'tensor']:"
        " dim 1 (16) is not divisible by tensor=3 (15 or 18 would be)\n"
        "Fix: MeshSpec(tensor=2), 4, 8 or 16; or map 'heads' to None;"
        ' or PathRules["**/up/kernel"] → P()'
    )


def test_the_shared_fix_mends_every_dim():
    leaves = [leaf("x", 12), leaf("y", 8)]
    text = message(PathRules({"*": P("tensor")}), leaves, tensor=5)
    # Divisors of both 12 and 8, not of the first alone.
    assert 'Fix: MeshSpec(tensor=2) or 4; or PathRules["*"] → P()' in text


def test_indivisible_by_a_product():
    text = message(PathRules({"x": P(("data", "tensor"))}), [leaf("x", 12)], data=2, tensor=4)
    assert "dim 0 (12) is not divisible by data=2 x tensor=4 = 8 (8 or 16 would be)" in text
    # 12 = 4 x 3: data may be 3, and no tensor size but a divisor of 6 helps.
    assert "Fix: MeshSpec(data=3); or" in text


def test_indivisible_leaves_the_other_dims_split():
    text = message(PathRules({"x": P("data", "tensor")}), [leaf("x", 4, 10)], data=2, tensor=4)
    assert "MeshSpec(tensor=2), 5 or 10; or PathRules[\"x\"] → P('data')" in text


def test_unknown_mesh_axis():
    text = message(PathRules({"x": P("modle")}), [leaf("x", 8)], data=2, model=4)
    assert "x f32[8]  PathRules[\"x\"] → P('modle') uses axis 'modle'" in text
    assert "mesh has data=2, model=4. Did you mean 'model'?" in text
    assert "Fix: one of 'data', 'model', or add 'modle' to the MeshSpec" in text


def test_unknown_mesh_axis_of_a_shape_rule():
    text = message(shard_largest("fdsp"), [leaf("x", 8)], fsdp=2)
    assert "shard_largest('fdsp') → P('fdsp') uses axis 'fdsp'" in text
    assert "Did you mean 'fsdp'?" in text


def test_unknown_logical_axis():
    rules = first_match(AxisRules({"heads": "tensor", "embed": None}), REPLICATED)
    text = message(rules, [leaf("q", 4, 8, axes=("embd", "heads"))], tensor=4)
    assert "q f32[4,8]  AxisRules does not list logical axis 'embd'. Did you mean 'embed'?" in text
    assert "Fix: AxisRules({..., 'embd': None}), or a mesh axis" in text


def test_names_that_do_not_count_the_dims():
    text = message(AxisRules({"a": None}), [leaf("q", 4, 8, axes=("a", None, None))], tensor=4)
    assert "names 3 logical axes ('a', None, None) for 2 dims" in text


def test_undecided_leaf_says_what_was_tried():
    rules = first_match(
        PathRules({"**/up/kernel": P("tensor")}),
        AxisRules({"embed": None}),
        shard_largest("tensor"),
    )
    leaves = [leaf("mlp/up/kernel", 8), leaf("mlp/up/kernels", 9)]
    text = message(rules, leaves, tensor=4)
    assert "1 parameter cannot be laid out on mesh (tensor=4)." in text
    assert "mlp/up/kernels f32[9]  no rule decides it (PathRules: no glob of 1 matches" in text
    assert "the nearest is '**/up/kernel'" in text
    assert "AxisRules: the leaf names no logical axes" in text
    assert "shard_largest('tensor'): no dim of [9] is a multiple of 4" in text
    assert "Fix: params=sk.first_match(strategy.params, sk.REPLICATED)" in text


def test_an_empty_chain_decides_nothing():
    assert "there are no rules" in message(first_match(), [leaf("x", 8)], data=2)


def test_rule_that_matches_nothing():
    rules = PathRules({"**/upp/kernel": P("data"), "**": REPLICATED})
    text = message(rules, [leaf("mlp/up/kernel", 8), leaf("bias", 8)], data=2)
    assert text.startswith("1 rule matches nothing.")
    assert 'PathRules["**/upp/kernel"]  matches none of the 2 parameters.' in text
    assert "The nearest path is 'mlp/up/kernel'." in text
    assert "PathRules(..., allow_unmatched=True)" in text
    permitted = PathRules({"**/upp/kernel": P("data"), "**": REPLICATED}, allow_unmatched=True)
    assert resolve(permitted, [leaf("bias", 8)], {"data": 2}) == {"bias": P()}


def test_entries_of_axis_rules_may_match_nothing():
    rules = first_match(AxisRules({"vocab": "data"}), REPLICATED)
    assert resolve(rules, [leaf("bias", 8)], {"data": 2}) == {"bias": P()}


def test_spec_longer_than_the_rank():
    rules = PathRules({"**/kernel": P("data", "model", None)})
    text = message(rules, [leaf("layer0/kernel", 16, 12)], data=2, model=4)
    assert "layer0/kernel f32[16,12]" in text
    assert "P('data', 'model', None) has 3 entries for 2 dims" in text
    assert "Fix: at most one entry per dim, such as P('data', 'model')" in text


def test_axis_used_twice_in_a_spec():
    text = message(PathRules({"x": P("data", "data")}), [leaf("x", 8, 8)], data=2)
    assert "P('data', 'data') uses axis 'data' twice, for dims 0 and 1" in text
    assert "Fix: use each mesh axis once, such as P('data')" in text


def test_axis_used_twice_through_names():
    rules = AxisRules({"heads": "tensor", "mlp": "tensor"})
    text = message(rules, [leaf("x", 8, 8, axes=("heads", "mlp"))], tensor=4)
    assert "uses axis 'tensor' twice, for dims 0 and 1" in text
    assert "Fix: map 'heads' or 'mlp' to another mesh axis or None" in text


def test_unconstrained():
    text = message(PathRules({"x": P(P.UNCONSTRAINED, "data")}), [leaf("x", 8, 8)], data=2)
    assert "P(P.UNCONSTRAINED, 'data') leaves a dim unconstrained" in text
    assert "None keeps it whole" in text


def test_unreduced():
    text = message(PathRules({"x": P("data", unreduced={"tensor"})}), [leaf("x", 8)], data=2)
    assert "has unreduced axes" in text


def test_everything_wrong_is_in_one_error():
    rules = first_match(
        PathRules({"a": P("data", None), "b": P("tensor"), "typo": REPLICATED}),
        AxisRules({"embed": "dta"}),
    )
    leaves = [leaf("a", 8), leaf("b", 7), leaf("c", 8), leaf("d", 8, axes=("embed",))]
    text = message(rules, leaves, data=2, tensor=4)
    assert text.startswith(
        "4 parameters cannot be laid out on mesh (data=2, tensor=4), and 1 rule matches nothing."
    )
    for part in ("2 entries", "dim 0 (7)", "no rule decides", "'dta'", 'PathRules["typo"]'):
        assert part in text


def test_check_names_what_the_leaves_are():
    problems = resolve_all(PathRules({"x": P()}), [leaf("y", 8)], {"data": 2}, what="moments")[1]
    assert "matches none of the 1 moments" in problems[-1].why


@pytest.mark.parametrize("glob", ["", "/a", "a/", "a//b"])
def test_globs_have_no_empty_segments(glob):
    with pytest.raises(ShardingError, match="a glob has an empty segment") as error:
        PathRules({glob: REPLICATED})
    assert f"PathRules[{glob!r}]" in str(error.value)


def test_double_stars_stand_alone():
    with pytest.raises(ShardingError, match=r"'\*\*' matches whole segments"):
        PathRules({"a/layer_**": REPLICATED})


@pytest.mark.parametrize("spec", ["tensor", None, ("data", None)])
def test_values_of_path_rules_are_specs(spec):
    with pytest.raises(ShardingError, match="is not a PartitionSpec"):
        PathRules({"a": spec})


@pytest.mark.parametrize("axes", [3, ("data", None), "", P("data")])
def test_values_of_axis_rules_are_axes(axes):
    with pytest.raises(ShardingError, match="is not a mesh axis, a tuple of them, or None"):
        AxisRules({"a": axes})


def batch_text(spec, *shape, **mesh):
    (problem,) = check_batch([leaf("tokens", *shape)], {"tokens": spec}, mesh)
    return f"{problem.subject}: {problem.why}. Fix: {problem.fix}"


def test_batch_that_does_not_divide():
    assert batch_text(P(("data", "model")), 6, 5, data=2, model=4) == (
        "tokens f32[6,5]: global batch 6 must be a multiple of 8 "
        "(data=2 x model=4 shard the batch dim). Fix: a global batch of 8"
    )
    text = batch_text(P("data"), 7, data=2)
    assert "multiple of 2 (data=2 shard the batch dim). Fix: a global batch of 6 or 8" in text


def test_other_dims_of_a_batch():
    text = batch_text(P("data", "context"), 8, 6, data=2, context=4)
    assert "batch → P('data', 'context'): dim 1 (6) is not divisible by context=4" in text


def test_batch_without_problems():
    specs = {"x": P("data"), "n": P()}
    assert check_batch([leaf("x", 8), leaf("n")], specs, {"data": 2}) == []


def test_check_spec_serves_activations():
    problems = check_spec(leaf("constrain", 8, 5), P(None, "tensor"), {"tensor": 2}, "activations")
    assert [p.why for p in problems] == [
        "activations → P(None, 'tensor'): dim 1 (5) is not divisible by tensor=2 (4 or 6 would be)"
    ]
