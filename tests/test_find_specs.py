"""Findings about arrays that lie otherwise than their axes, or their neighbours, say."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.parallel import strategies
from shardkit.report import Report

from ._programs import make_mesh, program

DEPTH, ROWS, EMBED, MLP = 3, 1024, 256, 64
KEPT = 4 * DEPTH * ROWS * EMBED // 2  # bytes of f32[3,1024,256] that data=2 splits


def init(key):
    def named(*dims):
        sizes = {"layers": DEPTH, "embed": EMBED, "mlp": MLP}
        return sk.WithAxes(jax.random.normal(key, tuple(sizes[d] for d in dims)), dims)

    return {"up": named("layers", "embed", "mlp"), "down": named("layers", "mlp", "embed")}


def loss(params, batch, key):
    def layer(x, w):
        with jax.named_scope("mlp"):
            x = sk.nn.constrain(x, "batch", "embed")
            hidden = sk.nn.constrain(jnp.tanh(x @ w["up"]), "batch", "mlp")
            # Its own spec for the hidden units, where `mlp` would do.
            other = sk.nn.constrain(jnp.sin(hidden), "batch", "hidden")
            return jnp.tanh(other @ w["down"]), None

    return jnp.mean(jax.lax.scan(sk.nn.remat(layer), batch["x"], params)[0] ** 2)


def reported(remat="none", **activations):
    both = strategies.data() | strategies.tensor()
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=dataclasses.replace(both.with_names(activations=activations), remat=remat),
    ).report()


def of_kind(report, kind):
    return [finding for finding in report.findings if finding.kind == kind]


@pytest.fixture(scope="module")
def disagreeing():
    return reported(hidden=None)


@pytest.fixture(scope="module")
def agreeing():
    return reported(hidden="tensor")


def test_activations_kept_whole_over_an_axis_that_splits_others(agreeing):
    (found,) = of_kind(agreeing, "replicated_activation")
    assert (found.axes, found.scope) == (("tensor",), "mlp")
    # What enters each layer is kept; what comes out of it is kept for the derivative of tanh.
    assert found.bytes % KEPT == 0
    assert found.bytes // KEPT in (2, 3)
    assert found.bytes < agreeing.memory.temp
    assert "kept for the backward pass, the same on all 4 devices of tensor" in found.why
    assert "constrain('batch', 'embed') f32[1024,256] as P('data', None)" in found.why
    assert "f32[3,1024,256]" in found.why
    assert "strategies.tensor(sequence=True)" in found.fix
    assert found.source.function == "loss.<locals>.layer"


def test_a_fix_is_not_what_is_declared_already(agreeing):
    (found,) = of_kind(agreeing, "replicated_activation")
    assert found.fix == 'strategies.tensor(sequence=True), or remat="full" to keep less'
    (kept,) = of_kind(reported("full", hidden="tensor"), "replicated_activation")
    assert kept.fix == "strategies.tensor(sequence=True)"
    assert kept.bytes < found.bytes


def test_activations_that_are_split_over_every_axis_are_no_finding():
    assert not of_kind(reported(hidden="tensor", embed="tensor"), "replicated_activation")


@pytest.mark.parametrize("spec", [P(), P("data")])
def test_rows_that_a_constraint_gathers_are_kept_whole_over_them(spec):
    mesh = make_mesh(data=8)

    def step(params, x):
        def mean(params):
            with jax.named_scope("loss"):
                rows = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
                made = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), rows, params)
                return jnp.mean(made[0] ** 2)

        return jax.grad(mean)(params)

    parts = {"params": ((DEPTH, EMBED, EMBED), P()), "batch": ((ROWS, EMBED), P("data"))}
    made = program(step, mesh, whole=("params",), **parts)
    found = of_kind(Report.of(made), "replicated_activation")
    assert {finding.axes for finding in found} == ({("data",)} if spec == P() else set())
    assert all('with "batch" on the rows\' axes' in finding.fix for finding in found)
    held = sum(finding.bytes for finding in found)
    assert held >= 4 * DEPTH * ROWS * EMBED if spec == P() else held == 0
    # Without the traced program nothing says what is whole.
    assert not of_kind(Report.of(dataclasses.replace(made, jaxpr=None)), "replicated_activation")


def test_a_gather_between_two_specs_names_the_one_that_no_other_agrees_with(disagreeing, agreeing):
    (found,) = [one for one in disagreeing.findings if "beside it spec_mismatch" in one.why]
    assert found.source.code == 'other = sk.nn.constrain(jnp.sin(hidden), "batch", "hidden")'
    code, _, where = found.fix.partition(" in the constraint at ")
    assert code == "sk.nn.constrain(x, 'batch', 'mlp')"
    assert where.startswith("test_find_specs.py:")
    gathers = disagreeing.ledger.where("tensor", "all-gather")
    assert 0 < found.bytes <= sum(row.wire_bytes for row in gathers)
    assert not [one for one in agreeing.findings if "spec_mismatch" in (one.kind, *one.why.split())]


def test_constraints_that_parameters_disagree_with_are_one_finding():
    def gathering(params, batch, key):
        def layer(x, w):
            # Split over `mlp` as a parameter, and whole where it is used.
            up = sk.nn.constrain(w["up"], "embed", "whole")
            hidden = sk.nn.constrain(jnp.tanh(x @ up), "batch", "whole")
            return jnp.tanh(hidden @ w["down"]), None

        return jnp.mean(jax.lax.scan(sk.nn.remat(layer), batch["x"], params)[0] ** 2)

    both = strategies.data() | strategies.tensor()
    report = sk.compile_step(
        gathering,
        optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=both.with_names(activations={"whole": None}),
    ).report()
    (found,) = [one for one in report.findings if "beside it spec_mismatch" in one.why]
    for names in ("'batch', 'mlp'", "'embed', 'mlp'"):
        code = f"sk.nn.constrain(x, {names}) in the constraint at test_find_specs.py:"
        assert code in found.fix
    assert not [one for one in of_kind(report, "parameter_gather") if one.leaf == "params/up"]


def test_a_residual_stream_split_over_length_is_no_disagreement():
    length, embed = 64, 32

    def rows(params, batch, key):
        x = sk.nn.constrain(batch["x"] * params["scale"], "batch", "residual_length", "embed")
        x = sk.nn.constrain(jnp.sin(x), "batch", "length", "embed")
        return jnp.mean(jnp.tanh(x.reshape(-1, length * embed) @ params["w"]) ** 2)

    step = sk.compile_step(
        rows,
        optax.sgd(0.1),
        init=lambda key: {
            "scale": sk.WithAxes(jnp.ones((embed,)), (None,)),
            "w": sk.WithAxes(jnp.ones((length * embed, 8)), (None, "mlp")),
        },
        batch={"x": jax.ShapeDtypeStruct((8, length, embed), jnp.float32)},
        mesh=sk.MeshSpec(data=2, tensor=4).build(),
        strategy=strategies.data() | strategies.tensor(sequence=True),
    )
    report = step.report()
    assert report.ledger.where("tensor", "all-gather")
    assert not of_kind(report, "spec_mismatch")
