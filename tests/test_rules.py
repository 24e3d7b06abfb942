"""Rules: which spec each leaf gets, beside plain references."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.errors import ShardingError
from shardkit._core.tree import Leaf
from shardkit.mesh import MeshSpec
from shardkit.rules import (
    REPLICATED,
    AxisRules,
    Passed,
    PathRules,
    count_shards,
    first_match,
    mesh_sizes,
    normalize_spec,
    resolve,
    resolve_all,
    shard_largest,
)
from shardkit.rules._path import matches

F32 = np.dtype("float32")
MESH = {"data": 2, "tensor": 4}
quick = settings(database=None, max_examples=150)


def leaf(path, *shape, axes=None):
    return Leaf(path, shape, F32, axes)


def reference_match(glob, path):
    """The meaning of a glob, by recursion on its segments and then on their characters."""

    def characters(pattern, text):
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(characters(pattern[1:], text[i:]) for i in range(len(text) + 1))
        return bool(text) and pattern[0] == text[0] and characters(pattern[1:], text[1:])

    def segments(globs, names):
        if not globs:
            return not names
        if globs[0] == "**":
            return any(segments(globs[1:], names[i:]) for i in range(len(names) + 1))
        return bool(names) and characters(globs[0], names[0]) and segments(globs[1:], names[1:])

    return segments(glob.split("/"), path.split("/") if path else [])


paths = st.lists(st.text("ab.", min_size=1, max_size=3), max_size=4).map("/".join)
globs = st.lists(
    st.one_of(
        st.just("**"),
        st.text("ab.*", min_size=1, max_size=3).filter(lambda s: "**" not in s),
    ),
    min_size=1,
    max_size=4,
).map("/".join)


@given(globs, paths)
@settings(quick, max_examples=500)
def test_globs_mean_what_the_reference_means(glob, path):
    assert matches(glob, path) == reference_match(glob, path)


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("**", "", True),
        ("**", "a/b", True),
        ("*", "a/b", False),
        ("*/b", "a/b", True),
        ("**/b", "b", True),
        ("a/**", "a", True),
        ("a/**/c", "a/c", True),
        ("layer_*/w", "layer_12/w", True),
        ("layer_*/w", "layer_12/x/w", False),
        ("a.c", "abc", False),
        ("w", "up/w", False),
        ("up", "up/w", False),
    ],
)
def test_globs(glob, path, expected):
    assert matches(glob, path) is expected


def test_first_glob_wins_and_short_specs_leave_dims_whole():
    rules = PathRules({"**/up/*": P(None, "tensor"), "**/kernel": P("data"), "**": REPLICATED})
    leaves = [leaf("up/kernel", 4, 8), leaf("down/kernel", 4, 8), leaf("bias", 8)]
    assert resolve(rules, leaves, MESH) == {
        "up/kernel": P(None, "tensor"),
        "down/kernel": P("data"),
        "bias": P(),
    }


def test_axis_rules_follow_names():
    rules = AxisRules({"embed": "data", "heads": "tensor", "head_dim": None})
    query = leaf("query", 8, 4, 3, axes=("embed", "heads", "head_dim"))
    assert resolve(rules, [query], MESH) == {"query": P("data", "tensor")}
    assert rules.spec(("heads", None, "embed")) == P("tensor", None, "data")
    assert isinstance(rules.decide(leaf("bare", 8), MESH), Passed)


def test_axis_rules_split_one_dim_over_several_axes():
    rules = AxisRules({"batch": ("data", "tensor"), "embed": ()})
    x = leaf("x", 16, 3, axes=("batch", "embed"))
    assert resolve(rules, [x], MESH) == {"x": P(("data", "tensor"))}


def test_axis_rules_join():
    one = AxisRules({"embed": "fsdp", "mlp": "fsdp", "norm": None})
    two = AxisRules({"mlp": "tensor", "norm": "tensor", "heads": "tensor"})
    assert one.merged(two) == AxisRules(
        {"embed": "fsdp", "mlp": ("fsdp", "tensor"), "norm": "tensor", "heads": "tensor"}
    )
    assert one.merged(one) == one
    assert one.replaced({"mlp": None, "x": "y"}).mesh_axes("mlp") == ()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 16), P(None, "tensor")),
        ((16, 16), P("tensor")),
        ((16, 18), P("tensor")),
        ((4, 12, 8), P(None, "tensor")),
        ((2, 4), P()),
    ],
)
def test_shard_largest_takes_the_largest_dim_that_divides(shape, expected):
    rule = shard_largest("tensor", min_size=16)
    assert resolve(rule, [leaf("x", *shape)], MESH) == {"x": expected}


def test_shard_largest_over_two_axes_needs_their_product():
    rule = first_match(shard_largest(("data", "tensor")), shard_largest("data"), REPLICATED)
    leaves = [leaf("a", 12, 8), leaf("b", 12, 6), leaf("c", 3)]
    assert resolve(rule, leaves, MESH) == {
        "a": P(None, ("data", "tensor")),
        "b": P("data"),
        "c": P(),
    }


def test_scalars_are_replicated_whatever_the_rule_says():
    assert resolve(PathRules({"**": P("data")}), [leaf("count"), leaf("x", 4)], MESH) == {
        "count": P(),
        "x": P("data"),
    }


def test_specs_come_in_normal_form():
    rules = PathRules({"a": P(("data",), None), "b": P(None, ("data", "tensor"), None)})
    specs = resolve(rules, [leaf("a", 2, 3), leaf("b", 3, 8, 1)], MESH)
    assert [tuple(spec) for spec in specs.values()] == [("data",), (None, ("data", "tensor"))]


def test_a_mesh_may_be_a_mesh_a_spec_or_sizes():
    spec = MeshSpec(data=2, tensor=4)
    for mesh in (spec, spec.build(), MESH):
        assert mesh_sizes(mesh) == MESH
        assert resolve(shard_largest("tensor"), [leaf("x", 8)], mesh) == {"x": P("tensor")}


def test_rules_are_values():
    def make():
        return first_match(
            PathRules({"a": P("data"), "b": REPLICATED}),
            AxisRules({"embed": ("data", "tensor"), "mlp": None}),
            shard_largest("data", min_size=3),
            REPLICATED,
        )

    assert make() == make()
    assert hash(make()) == hash(make())
    assert eval(repr(make())) == make()


atoms = st.sampled_from(
    [
        PathRules({"a/*": P("data")}),
        PathRules({"**/b": P(None, "tensor")}),
        AxisRules({"embed": "data", "mlp": "tensor"}),
        shard_largest("tensor", min_size=9),
        REPLICATED,
    ]
)
some_leaves = st.builds(
    Leaf,
    st.sampled_from(["a/b", "b", "c", "a/c/b"]),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.just(F32),
    st.sampled_from([None, ("embed", "mlp"), ("mlp", "mlp"), ("embed", "typo")]),
)


@given(atoms, atoms, atoms, some_leaves)
@quick
def test_chain_is_associative(a, b, c, one):
    left, right, flat = (
        first_match(first_match(a, b), c),
        first_match(a, first_match(b, c)),
        first_match(a, b, c),
    )
    assert left == right == flat
    asked = [rule.decide(one, MESH) for rule in (a, b, c)]
    first = next((d for d in asked if not isinstance(d, Passed)), None)
    decided = flat.decide(one, MESH)
    assert isinstance(decided, Passed) if first is None else decided == first


axes_entries = st.sampled_from([None, "data", "tensor", ("data", "tensor"), ("tensor", "data")])


@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple),
    st.lists(axes_entries, max_size=4),
    st.sampled_from([{"data": 2, "tensor": 4}, {"data": 3, "tensor": 2}, {"data": 1, "tensor": 6}]),
)
@settings(quick, max_examples=400)
def test_resolved_specs_divide_and_only_they_resolve(shape, entries, mesh):
    specs, problems = resolve_all(PathRules({"x": P(*entries)}), [leaf("x", *shape)], mesh)
    flat = [a for e in entries if e for a in ((e,) if isinstance(e, str) else e)]
    parts = [math.prod(mesh[a] for a in ((e,) if isinstance(e, str) else e or ())) for e in entries]
    legal = (
        len(entries) <= len(shape)
        and len(flat) == len(set(flat))
        and all(size % n == 0 for size, n in zip(shape, parts, strict=False))
    )
    assert (not problems) == legal
    assert bool(specs) == legal
    if legal:
        assert specs["x"] == normalize_spec(P(*entries))
        assert count_shards(specs["x"], mesh) == math.prod(parts)


def test_shards_are_what_jax_makes_of_the_spec():
    mesh = MeshSpec(data=2, tensor=4).build()
    shape = (8, 16, 3)
    for entries in itertools.product([None, "data", "tensor", ("data", "tensor")], repeat=2):
        specs, problems = resolve_all(PathRules({"x": P(*entries)}), [leaf("x", *shape)], mesh)
        if not problems:
            shard = NamedSharding(mesh, specs["x"]).shard_shape(shape)
            assert math.prod(shape) // math.prod(shard) == count_shards(specs["x"], mesh.shape)


def test_nothing_to_lay_out_is_no_error():
    assert resolve(PathRules({"a": P("data")}), [], MESH) == {}


def test_typed_keys_are_leaves_too():
    key = Leaf("keys", (8,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    assert resolve(shard_largest("data"), [key], MESH) == {"keys": P("data")}


def test_unknown_logical_axis_in_spec():
    with pytest.raises(ShardingError, match=r"does not list logical axis 'hed'\. Did you mean"):
        AxisRules({"heads": "tensor"}).spec(("hed",))


def test_renamed_rules_keep_their_order_and_axes():
    rules = AxisRules({"embed": "fsdp", "mlp": ("tensor", "expert"), "norm": None})
    renamed = rules.renamed({"embed": "hidden", "norm": "scale"})
    assert renamed == AxisRules({"hidden": "fsdp", "mlp": ("tensor", "expert"), "scale": None})
    assert [name for name, _ in renamed.table] == ["hidden", "mlp", "scale"]
    assert rules.renamed({"embed": "mlp", "mlp": "embed"}).spec(("mlp", "embed")) == P(
        "fsdp", ("tensor", "expert")
    )
    assert rules.renamed({}) == rules


def test_renaming_names_every_unknown_axis_and_every_collision():
    rules = AxisRules({"embed": "fsdp", "mlp": "tensor", "vocab": "tensor"})
    with pytest.raises(ShardingError) as raised:
        rules.renamed({"embedd": "hidden", "mlp": "vocab"})
    text = str(raised.value)
    assert "does not list logical axis 'embedd'. Did you mean 'embed'?" in text
    assert "one of 'embed', 'mlp', 'vocab'" in text
    assert "'mlp' and 'vocab' would both be 'vocab'" in text
