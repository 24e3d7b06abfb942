"""Any pytree of parameters, model state and batch, in every public function."""

import dataclasses
import functools
import itertools
import json
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit import testing
from shardkit._core.tree import leaves_by_path
from shardkit.checkpoint import export_safetensors, import_safetensors
from shardkit.parity._layout import find_misplaced_leaves, resolve_declared_specs
from shardkit.report import compare
from shardkit.run.guards import write_dump

from ._quick import EXHAUSTIVE, SLOW, some_quick

RNG, NUMBERS = np.random.default_rng(0), itertools.count()
X = RNG.standard_normal((8, 4)).astype(np.float32)


class Pair(NamedTuple):
    mu: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Registered:
    up: Any
    down: Any


# More fields than `Registered` has: structures of two registered dataclasses of as many fields are
# equal in JAX, though their hashes differ. One call of a function under `jax.jit` in some hundred
# gets the other class back then (optax.adamw, jax 0.10.2 to 0.12).
@flax.struct.dataclass
class Flax:
    wide: Any
    narrow: Any
    rest: Any = None


TREES = {
    "bare array": lambda a, b: a,
    "tuple": lambda a, b: (a, b),
    "named tuple": Pair,
    "registered dataclass": Registered,
    "flax dataclass": Flax,
    "nested lists": lambda a, b: [[a], [[b]]],
    "None leaves": lambda a, b: {"a": None, "b": a, "c": [None, b]},
    "empty subtrees": lambda a, b: {"a": {}, "b": a, "c": [(), b, {"d": []}]},
    "integer keys": lambda a, b: {0: a, 1: {10: b}},
    "keys with slashes": lambda a, b: {"mlp/~/up": {"w": a}, "mlp": {"b/*": b}},
    "keys with stars": lambda a, b: {"*": a, "**": {"a*b": b}},
    "empty keys": lambda a, b: {"": a, "a": {"": b}},
    "keys of dots": lambda a, b: {".": a, "..": {"..": b}},
    "a key within a key": lambda a, b: {"w": {"mu": a}, "mu": {"w": {"mu": b}}},
}


def loss(params, batch, key):
    """Uses every leaf of parameters and batch, of whatever tree."""
    rows = sum(jax.tree.leaves(batch))
    return sum(jnp.mean(jnp.square(rows @ w - 1)) for w in jax.tree.leaves(params))


def stateful(params, batch, key, model_state):
    value = loss(params, batch, key) + sum(jnp.sum(x) for x in jax.tree.leaves(model_state))
    return value, {}, jax.tree.map(lambda x: x * 0.5, model_state)


def compiled(made, mesh, *, where="params", optimizer=None, **options):
    """A step one of whose trees is `build_dataclass`."""

    def init(key):
        a, b = (jax.random.normal(k, (4, 8)) for k in jax.random.split(key))
        params = made(a, b) if where == "params" else {"w": a}
        return (
            sk.Variables(params, made(jnp.ones(3), jnp.ones(())))
            if where == "model_state"
            else params
        )

    split = sk.Strategy(params=sk.PathRules({"**": P("fsdp")}), batch=P("fsdp"))
    options.setdefault("strategy", split)
    return sk.compile_step(
        sk.Loss(stateful, stateful, stateful=True) if where == "model_state" else loss,
        optimizer or optax.adamw(0.1),
        init=init,
        batch=batch_of(made) if where == "batch" else {"x": X},
        mesh=mesh,
        **options,
    )


def batch_of(made):
    return made(X, X[::-1])


def mesh_of(n=2):
    return sk.MeshSpec(fsdp=n).build(devices=jax.devices()[:n])


PLACES = [(name, "params") for name in TREES]
PLACES += [
    (name, where)
    for name in ("bare array", "named tuple", "None leaves", "empty keys")
    for where in ("batch", "model_state")
]


# One of each kind of difference; the others are found by the same code.
QUICK = {
    *(("bare array", where) for where in ("params", "batch")),
    *((name, "params") for name in ("None leaves", "keys with slashes", "empty keys")),
    *(("named tuple", "model_state"), ("empty subtrees", "params"), ("integer keys", "params")),
}


def marks_of(number):
    if PLACES[number] in QUICK:
        return ()
    return SLOW if number % 2 else EXHAUSTIVE


@functools.cache
def step_of(name, where="params", devices=2):
    return compiled(TREES[name], mesh_of(devices), where=where)


@pytest.fixture(
    params=[pytest.param(one, marks=marks_of(number)) for number, one in enumerate(PLACES)],
    ids=[f"{name} as {where}" for name, where in PLACES],
    scope="module",
)
def case(request):
    """A compiled step, one of whose trees is of a kind, and its batch."""
    name, where = request.param
    return step_of(name, where), batch_of(TREES[name]) if where == "batch" else {"x": X}


def bits(tree):
    words = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(words)]


def test_a_step_updates_gives_gradients_and_evaluates(case):
    step, batch = case
    state = step.init(jax.random.key(0))
    metrics, gradients = step.gradients(state, batch)
    assert jax.tree.structure(gradients) == jax.tree.structure(state.params)
    scores = step.evaluate(state, step.shard_batch(batch))
    np.testing.assert_allclose(scores["loss"], metrics["loss"], rtol=1e-6)
    assert sk.check_replicas(state) == ()
    after, _ = step(state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(step.abstract_state)
    assert int(after.step) == 1


def test_a_report_names_every_leaf_of_its_own(case):
    step, batch = case
    report = step.report()
    saved = json.loads(report.to_json())
    n = len(jax.tree.leaves((step.abstract_state, batch)))
    assert len({(leaf["part"], leaf["path"]) for leaf in saved["leaves"]}) == n
    assert str(report)
    assert report.to_html()
    assert str(compare(report, report))


def test_explain_lists_every_leaf(case):
    step, batch = case
    state = step.abstract_state
    for tree in (state.params, state.opt_state, state.model_state, batch):
        found = sk.explain_rules(sk.REPLICATED, tree, step.mesh)
        assert len({row.leaf.path for row in found.rows}) == len(jax.tree.leaves(tree))
        assert str(found)


def test_a_checkpoint_gives_back_every_leaf(case, tmp_path):
    step, _ = case
    state = step.init(jax.random.key(0))
    with sk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    back = sk.Checkpointer(tmp_path).restore(step.abstract_state, step.shardings).state
    assert bits(back) == bits(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_safetensors_give_back_every_leaf(case, tmp_path):
    step, batch = case
    trees = {"params": step.init(jax.random.key(0)).params, "batch": step.shard_batch(batch)}
    for name, tree in trees.items():
        export_safetensors(tmp_path / name, tree)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        shardings = jax.tree.map(lambda x: x.sharding, tree)
        assert bits(import_safetensors(tmp_path / name, abstract, shardings)) == bits(tree)


def test_a_dump_is_replayed(case, tmp_path):
    step, batch = case
    state = step.init(jax.random.key(0))
    bad = step.shard_batch(jax.tree.map(lambda x: np.full_like(x, np.inf), batch))
    write_dump(tmp_path, 1, state=state, batch=bad, values={"loss": float("inf")}, config={})
    found = sk.replay(tmp_path, step)
    assert found.reproduced
    assert len(found.batch) == len(jax.tree.leaves(batch))
    assert all(leaf in str(found) for leaf in list(found.batch)[:1])


@pytest.mark.parametrize(
    ("name", "where"), some_quick(PLACES, ("bare array", "params"), ("empty keys", "params"))
)
def test_verify_proves_every_leaf(name, where):
    def factory(mesh):
        return step_of(name, where, mesh.size)

    certificate = testing.assert_matches_one_device(factory, sk.MeshSpec(fsdp=2), steps=2)
    leaves = {row.check: row.leaf for row in certificate.rows}
    step = step_of(name, where)
    assert leaves["gradients"] in leaves_by_path(step.abstract_state.params)
    assert leaves["k-step state"] in leaves_by_path(step.abstract_state)


@pytest.mark.parametrize("name", TREES)
def test_the_layout_that_verify_resolves_is_compared_at_every_leaf(name):
    step = step_of(name)
    state = step.init(jax.random.key(0))
    specs = resolve_declared_specs(step.spec, step.mesh, state)
    assert specs.keys() >= leaves_by_path(state).keys()
    moved = {path: P() for path in specs}
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    wrong = dict(find_misplaced_leaves(parts, moved, step.mesh, "now"))
    split = {p for p, s in leaves_by_path(step.shardings).items() if any(s.spec)}
    assert wrong.keys() == split != set()


@pytest.mark.parametrize("name", TREES)
def test_a_plan_takes_it(name):
    found = sk.plan(step_of(name).spec, "tpu:v5e:2x2")
    assert found.rows
    assert str(found)


@pytest.mark.parametrize("name", ["bare array", "named tuple", "None leaves", "empty keys"])
def test_explicit_collectives_take_it(name):
    steps = compiled(TREES[name], mesh_of(), mode="shard_map"), step_of(name)
    results = [step(step.init(jax.random.key(0)), {"x": X}) for step in steps]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_moments_of_a_bare_array_have_its_names_and_its_rule():
    """Neither was found for the empty path."""
    w = jnp.ones((1024, 512))
    step = sk.compile_step(
        lambda params, batch, key: jnp.mean(batch @ params),
        optax.adam(0.1),
        init=lambda key: sk.WithAxes(w, ("embed", "mlp")),
        batch=np.ones((8, 1024), np.float32),
        mesh=mesh_of(),
        strategy=sk.Strategy(params=sk.REPLICATED, batch=P("fsdp")),
    )
    report = step.report()
    moments = [leaf for leaf in report.leaves if leaf.path in ("0/mu", "0/nu")]
    assert [leaf.names for leaf in moments] == [("embed", "mlp")] * 2
    assert all(leaf.declared_replicated for leaf in moments)
    assert not [one for one in report.findings if one.kind == "replicated"]


def test_a_finding_about_a_bare_array_names_it_and_gives_a_rule_that_works():
    def step(rules):
        return sk.compile_step(
            lambda params, batch, key: jnp.mean(batch @ params),
            optax.sgd(0.1),
            init=lambda key: sk.WithAxes(jnp.ones((1024, 512)), ("embed", "mlp")),
            batch=np.ones((8, 1024), np.float32),
            mesh=mesh_of(),
            strategy=sk.Strategy(params=rules, batch=P("fsdp")),
        )

    def replicated(step):
        return [one for one in step.report().findings if one.kind == "replicated"]

    (found,) = replicated(step(sk.AxisRules({"embed": None, "mlp": None})))
    assert found.leaf == "params"
    rule = found.fix.removeprefix("params=sk.first_match(").partition(", strategy")[0]
    assert replicated(step(eval(rule, {"sk": sk, "P": P}))) == []


SAME = {
    "params": {"a": {"b": 1.0}, "a/b": 2.0},
    "deeper": {"x": [{"0/y": 1.0, "0": {"y": 2.0}}]},
    "empty": {"": {"": 1.0}, "''/''": 2.0},
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("where", ["params", "batch", "model_state"])
def test_two_leaves_of_one_path_are_refused_with_both_their_names(name, where, tmp_path):
    """One of them was lost by every save."""
    tree = SAME[name]

    def made(a, b):
        return jax.tree.unflatten(jax.tree.structure(tree), [a, b])

    keyed = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree)]
    with pytest.raises(sk.errors.TreeError) as caught:
        compiled(made, mesh_of(), where=where)
    assert all(one in str(caught.value) for one in keyed)
    arrays = jax.tree.map(jnp.asarray, tree)
    for save in (
        lambda: sk.Checkpointer(tmp_path / "steps").save(1, arrays),
        lambda: export_safetensors(tmp_path / "file", arrays),
    ):
        with pytest.raises(sk.errors.TreeError) as caught:
            save()
        assert all(one in str(caught.value) for one in keyed)
    with pytest.raises(sk.errors.TreeError, match="f32"):
        sk.explain_rules(sk.REPLICATED, arrays, mesh_of())
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("where", ["params", "batch", "model_state"])
def test_keys_of_several_types_are_refused_by_the_dict_that_has_them(where, tmp_path):
    """JAX sorts the keys of a dict, and says only that it cannot."""
    told = rf"{where}/deep  has keys of several types: 1, '1'"
    with pytest.raises(sk.errors.TreeError, match=told):
        compiled(lambda a, b: {"deep": {1: a, "1": b}}, mesh_of(), where=where)
    tree = {"deep": {1: jnp.ones(4), "1": jnp.zeros(2)}}
    for use in (
        lambda: sk.Checkpointer(tmp_path / "steps").save(1, tree),
        lambda: export_safetensors(tmp_path / "file", tree),
        lambda: sk.explain_rules(sk.REPLICATED, tree, mesh_of()),
    ):
        with pytest.raises(sk.errors.TreeError, match="deep  has keys of several types"):
            use()


def test_a_batch_of_keys_of_several_types_is_refused_when_it_is_passed():
    step = compiled(lambda a, b: {"a": a, "b": b}, mesh_of(), where="batch")
    state, batch = step.init(jax.random.key(0)), {1: np.ones(4), "1": np.ones(4)}
    for use in (step, step.evaluate, step.gradients, lambda _, b: step.shard_batch(b)):
        with pytest.raises(sk.errors.TreeError, match="batch  has keys of several types"):
            use(state, batch)


def test_a_leaf_inside_the_folder_of_another_is_not_saved(tmp_path):
    """`a/0` is the first file of an array `a`."""
    tree = {"a": jnp.ones(4), "a/0": jnp.zeros(4)}
    with pytest.raises(sk.errors.CheckpointError, match=r"a/0 .* files of a"):
        sk.Checkpointer(tmp_path).save(1, tree)
    assert sk.Checkpointer(tmp_path).steps() == ()
    export_safetensors(tmp_path / "file", tree)


def test_no_key_leads_out_of_the_folder_of_a_checkpoint(tmp_path):
    tree = {"..": {"..": {"..": {"..": jnp.ones(4)}}}, ".": jnp.zeros(2), "": {"": jnp.ones(1)}}
    before = set(tmp_path.iterdir())
    sk.Checkpointer(tmp_path / "steps").save(1, tree)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "steps"}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert bits(sk.Checkpointer(tmp_path / "steps").restore(abstract, one).state) == bits(tree)


ODD = ["a..b", "..c", "%2E", "%", "0", ".zarray", "manifest.json", "\0", "\ud800", "é", "e\u0301"]
NAMES = st.text(st.characters(exclude_characters="/"), max_size=20)


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAMES, min_size=8, max_size=12, unique=True))
@example(ODD)
def test_leaves_of_any_names_come_back(tmp_path, names):
    tree = {"params": {name: jnp.full(2, i, jnp.int32) for i, name in enumerate(names)}}
    folder = tmp_path / str(next(NUMBERS))
    sk.Checkpointer(folder).save(1, tree)
    assert bits(sk.Checkpointer(folder).restore(tree).state) == bits(tree)


def test_a_name_that_no_file_can_have_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(sk.errors.CheckpointError, match="has 360 bytes; files have at most 255"):
        sk.Checkpointer(tmp_path / "steps").save(1, {"a": {"日" * 40: jnp.ones(1)}})
    assert not (tmp_path / "steps").exists()


def test_copies_of_nothing_are_equal():
    assert sk.check_replicas({}) == ()
