"""Every check of `sk.verify` finds the bugs that it must find."""

import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardkit import Budget, Mean, MeshSpec, PathRules, Strategy, compile_step, testing
from shardkit.errors import BudgetError, VerificationError
from shardkit.parity import ParityReport, ParityRow
from shardkit.testing import (
    MUTATIONS,
    KillMatrix,
    MutationResult,
    assert_collectives,
    assert_matches_one_device,
    assert_within,
    kill_matrix,
)

MESH = MeshSpec(data=2, tensor=2)
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
FAST = ("psum dropped", "key not folded", "wrong spec", "updates not counted")


def loss_fn(params, batch, key):
    h = jax.nn.relu(batch["x"] @ params["up"])
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h, 0)
    weight = batch["w"].sum()
    total = jnp.sum(batch["w"] * jnp.mean((h @ params["down"] - batch["x"]) ** 2, axis=-1))
    return Mean(total, weight), {"size": Mean(jnp.sum(batch["w"] * h.mean(-1)), weight)}


def init(key):
    up, down = jax.random.split(key)
    return {"up": jax.random.normal(up, (4, 8)), "down": jax.random.normal(down, (8, 4))}


def batches():
    rng = np.random.default_rng(0)
    w = np.array([0, 0, 0, 0, 1, 1, 0, 1], np.float32)
    return [{"x": rng.standard_normal((8, 4), np.float32), "w": w} for _ in range(2)]


def factory(mesh, **given):
    return compile_step(
        loss_fn,
        optax.adamw(1e-2),
        init=init,
        batch=batches()[0],
        mesh=mesh,
        strategy=Strategy(
            params=PathRules({"up": P(None, "tensor"), "down": P("tensor")}),
            batch=P("data"),
            accumulate=2,
        ),
        **given,
    )


def unchecked(mesh):
    """The step when its loss is mutated into none that rows can be split of."""
    return factory(mesh, independent_rows=True)


def mesh():
    return MESH.build(devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def matrix():
    chosen = [BY_NAME[name] for name in FAST]
    return kill_matrix(factory, mesh(), batches=batches(), steps=2, mutations=chosen)


def test_the_step_itself_passes(matrix):
    matrix.control.check()


@pytest.mark.parametrize("at", range(len(FAST)), ids=FAST)
def test_bugs_are_found_by_their_check(matrix, at):
    killed = matrix.rows[at]
    assert killed.missed_checks == ()
    assert killed.ok


def test_the_matrix_reads_well(matrix):
    text = str(matrix)
    assert "without a mutation: passes" in text
    assert "psum dropped killed by gradients, copies" in " ".join(text.split())
    assert text.endswith("4 of 4 mutations killed.")
    assert max(map(len, text.splitlines())) <= 100
    assert matrix.check() is matrix


@pytest.mark.slow
def test_every_mutation_is_killed():
    matrix = kill_matrix(factory, mesh(), batches=batches()).check()
    assert [row.mutation for row in matrix.rows] == list(MUTATIONS)


LATER = ("evaluation shrunk", "later metrics doubled", "later norms doubled", "updates not counted")


@pytest.mark.slow
def test_what_is_wrong_from_the_second_step_on_fails_no_check_of_the_first():
    chosen = [BY_NAME[name] for name in LATER]
    matrix = kill_matrix(factory, mesh(), batches=batches(), steps=2, mutations=chosen).check()
    assert [row.failed_checks for row in matrix.rows] == [m.killed_by for m in chosen]


def test_every_check_has_a_mutation_that_only_a_working_check_kills(matrix):
    killers = {check for mutation in MUTATIONS for check in mutation.killed_by}
    assert killers == {row.check for row in matrix.control.rows}


ALL = [
    mutation
    for name in testing.__all__
    if name.endswith("MUTATIONS")
    for mutation in getattr(testing, name)
]


@pytest.mark.parametrize("mutation", ALL, ids=[mutation.name for mutation in ALL])
def test_every_seam_is_a_function_that_is_patched_and_restored(mutation):
    before = [pkgutil.resolve_name(path) for path, _ in mutation.seams]
    with mutation.apply():
        inside = [pkgutil.resolve_name(path) for path, _ in mutation.seams]
    after = [pkgutil.resolve_name(path) for path, _ in mutation.seams]
    assert mutation.seams
    assert all(map(callable, before))
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("path", ["_gradients.gone", "_gone.f"])
def test_a_seam_that_was_renamed_is_an_error(path):
    stale = testing.Mutation(
        "stale", "", ("loss",), ((f"shardkit.step.{path}", lambda original: original),)
    )
    with pytest.raises(AttributeError, match="gone"), stale.apply():
        raise AssertionError("patched")


def test_no_two_mutations_share_a_name():
    assert len({mutation.name for mutation in ALL}) == len(ALL)
    assert len(ALL) == 39


def test_a_survivor_is_an_error():
    passed = ParityReport((ParityRow("m", "loss", "loss", 0.0, 0.0, 1.0),), "")
    found = (ParityRow("m", "loss", "loss", 2.0, 0.0, 1.0),)
    matrix = KillMatrix(passed, (MutationResult(BY_NAME["wrong spec"], found),))
    assert "wrong spec  SURVIVES  by layout (also loss)" in str(matrix)
    with pytest.raises(VerificationError) as raised:
        matrix.check()
    message = str(raised.value)
    assert message.startswith("1 mutation of 1 not killed.")
    assert "not found by layout, only by loss" in message
    assert "Fix: a mesh that splits batch and parameters" in message


def test_a_step_that_fails_without_a_mutation_proves_nothing():
    failed = ParityReport((ParityRow("m", "loss", "loss", 2.0, 0.0, 1.0),), "")
    matrix = KillMatrix(failed, ())
    assert not matrix.ok
    with pytest.raises(VerificationError, match="1 check failed on 1 of 1 meshes"):
        matrix.check()


@pytest.mark.slow
def test_assert_matches_one_device_fails_on_a_bug():
    small = MeshSpec(data=2, tensor=1)
    with BY_NAME["weights ignored"].apply(), pytest.raises(VerificationError, match="loss is off"):
        assert_matches_one_device(unchecked, small, batches=batches(), steps=1)


def test_assertions_on_the_compiled_step():
    report = factory(mesh()).report()
    assert_collectives(report, {"all-to-all": 0, ("data", "all-reduce"): _count(report)})
    with pytest.raises(BudgetError) as raised:
        assert_collectives(report, {"all-reduce": 0, "all-to-all": 3})
    message = str(raised.value)
    assert "2 numbers not as expected in the step compiled for mesh (data=2, tensor=2)." in message
    assert "collectives['all-reduce']  0 expected," in message
    assert "collectives['all-to-all']  3 expected, 0 found" in message
    assert "Fix:" in message
    assert_within(report, Budget(reductions_per_step={"data": 1}))
    with pytest.raises(BudgetError):
        assert_within(report, Budget(memory_bytes=1))


def _count(report):
    return sum(row.trips or 1 for row in report.ledger.where("data", "all-reduce"))
