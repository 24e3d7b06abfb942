"""Owners: whole matrices of an optimizer are moved once, and give the numbers of one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

import shardkit as sk

from ._quick import some_quick

fsdp, tensor, zero = sk.strategies.fsdp, sk.strategies.tensor, sk.strategies.zero
ROWS = {"x": np.linspace(0.5, 1.5, 8, dtype=np.float32)}
Dims = contrib.MuonDimensionNumbers
# Shape, logical axes, and which dims are rows and columns of a matrix.
STACKED = {
    "up": ((3, 16, 24), ("layers", "embed", "mlp"), Dims(1, 2)),
    "gate": ((3, 16, 24), ("layers", "embed", "mlp"), Dims(1, 2)),
    "down": ((3, 24, 16), ("layers", "mlp", "embed"), Dims(1, 2)),
    "norm": ((3, 16), ("layers", "norm"), None),
}
HEADS = {
    "query": ((3, 16, 2, 8), ("layers", "embed", "heads", None), Dims(1, (2, 3))),
    "out": ((3, 2, 8, 16), ("layers", "heads", None, "embed"), Dims((1, 2), 3)),
    "bias": ((16,), ("norm",), None),
}
UNSTACKED = {f"layer{i}": ((16, 24), ("embed", "mlp"), Dims(0, 1)) for i in range(5)}
EXPERTS = {
    "up": ((3, 2, 16, 24), ("layers", "experts", "embed", "mlp"), Dims(2, 3)),
    "router": ((3, 16, 2), ("layers", "embed", None), None),
}
LAYERS = {"w": ((8, 16, 16), ("layers", "embed", "mlp"), Dims(1, 2))}


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spec_of(model, optimizer, strategy, **options):
    """A loss whose gradients are given matrices of full rank, times the mean of the rows."""
    seeds = {name: i for i, name in enumerate(model)}

    def init(key):
        return {
            name: sk.WithAxes(jnp.asarray(numbers(shape, seeds[name])), axes)
            for name, (shape, axes, _) in model.items()
        }

    def loss_fn(params, batch, key):
        dot = sum(jnp.vdot(params[n], numbers(model[n][0], 100 + seeds[n])) for n in model)
        return jnp.mean(batch["x"]) * dot / 1000

    return sk.StepSpec(
        loss_fn=loss_fn, optimizer=optimizer, init=init, batch=ROWS, strategy=strategy, **options
    )


def mesh_of(**sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


def muon(model, **options):
    dims = {name: dims for name, (_, _, dims) in model.items()}
    options = {"weight_decay": 0.1, **options}
    chained = contrib.muon(0.05, muon_weight_dimension_numbers=dims, **options)
    return optax.chain(optax.clip_by_global_norm(1.0), chained)


def by_hand(spec, steps):
    """The same updates in plain optax, on one device."""

    @jax.jit
    def update(params, opt_state):
        value = functools.partial(spec.loss_fn, batch=spec_rows, key=None)
        loss, grads = jax.value_and_grad(value)(params)
        optimizer = optax.with_extra_args_support(spec.optimizer)
        extra = {"value": loss, "grad": grads, "value_fn": value}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    spec_rows = jax.tree.map(jnp.asarray, ROWS)
    params = jax.tree.map(
        lambda x: x.value, spec.init(None), is_leaf=lambda x: isinstance(x, sk.WithAxes)
    )
    opt_state = spec.optimizer.init(params)
    for _ in range(steps):
        params, opt_state = update(params, opt_state)
    return params, opt_state


def check_numbers(spec, step):
    state = step.init(jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, ROWS)
    ours, theirs = (state.params, state.opt_state), by_hand(spec, 3)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


def moves(report):
    return [row for row in report.ledger if row.moves_matrices]


def products(report):
    """Other collectives of the optimizer than small norms."""
    return [
        row
        for row in report.ledger
        if row.by_optimizer and not row.moves_matrices and row.payload_bytes > 256
    ]


def least_bytes(model, **ways):
    """Of every matrix 1/n is here; (n - 1)/n of that leaves, and comes back."""
    sizes = [4 * math.prod(shape) for shape, _, dims in model.values() if dims]
    n = math.prod(ways.values())
    return sum(2 * (size - 1) / size for size in ways.values()) * sum(sizes) / n


# The loss here has no tokens to route.
EXPERT_WEIGHTS = dataclasses.replace(fsdp() | sk.strategies.expert(), overrides=())
CASES = {
    "fsdp": (STACKED, fsdp(), {"fsdp": 4}),
    "unstacked": (UNSTACKED, fsdp(), {"fsdp": 4}),
    "fsdp x tensor": (HEADS, fsdp() | tensor(), {"fsdp": 2, "tensor": 2}),
    "zero": (STACKED, zero(), {"data": 4}),
    "zero x tensor": (HEADS, zero() | tensor(), {"data": 2, "tensor": 2}),
    "experts": (EXPERTS, EXPERT_WEIGHTS, {"fsdp": 2, "expert": 2}),
}


@pytest.mark.parametrize("name", some_quick(CASES, "fsdp", "unstacked", "experts"))
def test_matrices_move_once_and_give_the_numbers_of_one_device(name):
    model, strategy, sizes = CASES[name]
    spec = spec_of(model, muon(model), strategy)
    step = spec.compile(mesh_of(**sizes))
    check_numbers(spec, step)
    report = step.report()
    assert not products(report)
    assert {row.kind for row in moves(report)} == {"all-to-all"}
    assert "optimizer_collective" not in {finding.kind for finding in report.findings}
    # Experts stay on the devices that have them.
    ways = {axis: n for axis, n in sizes.items() if axis != "expert"}
    least = least_bytes(model, **ways) / sizes.get("expert", 1)
    sent = sum(row.wire_bytes for row in moves(report))
    assert least <= sent <= 2 * least


def test_layers_that_the_axis_divides_send_the_least_and_the_minimum_knows_it():
    step = spec_of(LAYERS, muon(LAYERS), fsdp()).compile(mesh_of(fsdp=8))
    report = step.report()
    least = least_bytes(LAYERS, fsdp=8)
    assert sum(row.wire_bytes for row in moves(report)) == least
    elementwise = step.replace(optimizer=optax.adamw(1e-3)).report()
    (with_moves,), (without,) = report.minima, elementwise.minima
    assert with_moves.bytes - without.bytes == least
    assert with_moves.wire - without.wire == least


@pytest.mark.slow
def test_without_owners_every_product_is_split():
    step = spec_of(LAYERS, muon(LAYERS), fsdp(), owners=False).compile(mesh_of(fsdp=8))
    report = step.report()
    assert not moves(report)
    sent = sum(row.wire_bytes for row in products(report))
    assert sent > 10 * least_bytes(LAYERS, fsdp=8)
    assert "optimizer_collective" in {finding.kind for finding in report.findings}


def whiten(power=0.25, over_layers=False):
    """Keeps `G Gᵀ` of each layer and multiplies with its inverse root, as shampoo does."""

    def start(params):
        return jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], p.shape[-2])), params)

    def update(grads, state, params=None):
        del params
        if over_layers:  # then a layer's matrix is nothing that can be computed alone
            grads = jax.tree.map(lambda g: g - g.mean(0), grads)
        state = jax.tree.map(lambda s, g: 0.9 * s + g @ g.mT, state, grads)

        def one(gram, g):
            values, vectors = jnp.linalg.eigh(gram)
            inverse = (vectors * (jnp.abs(values)[..., None, :] + 0.1) ** -power) @ vectors.mT
            return -0.1 * inverse @ g

        return jax.tree.map(one, state, grads), state

    return optax.GradientTransformation(start, update)


SQUARE = {"w": ((4, 8, 8), ("layers", "embed", "mlp"), Dims(1, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("over_layers", [False, True])
def test_an_optimizer_with_matrices_as_state(over_layers):
    grams = sk.PathRules({"**": P(None, "fsdp")})
    strategy = dataclasses.replace(fsdp(min_size=0), opt_state=grams)
    spec = spec_of(SQUARE, whiten(over_layers=over_layers), strategy, owners=True)
    step = spec.compile(mesh_of(fsdp=2))
    check_numbers(spec, step)
    assert moves(step.report())


def now_and_then(every):
    """Keeps a rotation of each matrix, made anew every few steps; each matrix asks for itself."""

    def start(params):
        turns = jax.tree.map(lambda p: jnp.eye(p.shape[0]) + 0.1 * jnp.ones_like(p), params)
        return jnp.zeros((), jnp.int32), turns

    def update(grads, state, params=None):
        count = state[0] + 1

        def one(path, g, turn):
            now = count % every[path[0].key] == 0
            # Signs of the columns of a factorization are not those of one device.
            turn = jax.lax.cond(now, lambda: jnp.abs(jnp.linalg.qr(g + turn)[0]), lambda: turn)
            return -0.1 * turn @ g, turn

        pairs = jax.tree_util.tree_map_with_path(one, grads, state[1])
        updates, turns = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        return updates, (count, turns)

    return optax.GradientTransformation(start, update)


def test_matrices_that_ask_the_same_condition_move_together():
    model = {f"layer{i}": ((8, 8), ("embed", "mlp"), Dims(0, 1)) for i in range(6)}
    every = {name: 2 if i < 4 else 3 for i, name in enumerate(model)}
    spec = spec_of(model, now_and_then(every), fsdp(min_size=0), owners=True)
    step = spec.compile(mesh_of(fsdp=2))
    check_numbers(spec, step)
    report = step.report()
    # Four matrices with one condition and two with another: gradient and rotation there, update
    # and rotation back, each half of a matrix of 256 bytes and half of that.
    assert sum(row.wire_bytes for row in moves(report)) == 6 * 4 * 64
    assert len(moves(report)) <= 8
    elementwise = step.replace(optimizer=optax.sgd(1e-3)).report()
    assert report.minima[0].bytes - elementwise.minima[0].bytes == 6 * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": True},
        {"preconditioning": "aol"},
        {"ns_coeffs": "dion"},
        {"mu_dtype": jnp.bfloat16, "consistent_rms": 0.2},
    ],
    ids=str,
)
def test_other_forms_of_muon(options):
    spec = spec_of(STACKED, muon(STACKED, **options), fsdp())
    step = spec.compile(mesh_of(fsdp=2))
    assert moves(step.report())
    state = step.init(jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, ROWS)
    theirs = jax.tree.leaves(by_hand(spec, 3)[0])
    for a, b in zip(jax.tree.leaves(state.params), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_optimizer_that_computes_the_loss_is_left_alone():
    search = optax.chain(
        optax.sgd(0.1), optax.scale_by_backtracking_linesearch(max_backtracking_steps=2)
    )
    spec = spec_of(STACKED, search, fsdp())
    step = spec.compile(mesh_of(fsdp=2))
    check_numbers(spec, step)
    assert not moves(step.report())


def own(chosen):
    """An optimizer of a user's own: what it multiplies by depends on the size of a leaf."""

    def update(grads, state, params=None):
        def one(g):
            by = 1.0 if g.size >= 200 else 0.5
            return -0.1 * by * chosen(g) * state.astype(g.dtype)

        return jax.tree.map(one, grads), state

    return optax.GradientTransformation(lambda params: jnp.asarray(1.0), update)


def test_an_optimizer_of_ones_own_stays_as_it_is_unless_owners_are_declared():
    optimizer = own(lambda g: jnp.einsum("lij,lkj,lkm->lim", g, g, g))
    spec = spec_of(LAYERS, optimizer, fsdp(min_size=0))
    step = spec.compile(mesh_of(fsdp=2))
    check_numbers(spec, step)
    report = step.report(try_fixes=True)
    assert not moves(report)
    (found,) = [one for one in report.findings if one.kind == "optimizer_collective"]
    assert found.fix.startswith("StepSpec(owners=True), which moves each matrix whole")
    owned = step.replace(owners=True).report()
    assert moves(owned)
    assert found.remaining == owned.ledger.total() < report.ledger.total()
    assert "optimizer_collective" not in {one.kind for one in owned.findings}


def test_owners_leave_the_types_of_an_element_wise_optimizer():
    """`jnp.asarray(0.1)` in the state takes the dtype of what it is multiplied with."""

    def update(grads, state, params=None):
        momentum, decay = state
        momentum = jax.tree.map(lambda m, g: decay * m + g, momentum, grads)
        return jax.tree.map(lambda m: -0.1 * m, momentum), (momentum, decay)

    def start(params):
        return jax.tree.map(jnp.zeros_like, params), jnp.asarray(0.9)

    def init(key):
        return {"w": sk.WithAxes(numbers((8, 16), 3).astype(jnp.bfloat16), ("embed", "mlp"))}

    def loss(params, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["w"].astype("f")) ** 2)

    spec = sk.StepSpec(
        loss_fn=loss,
        init=init,
        optimizer=optax.GradientTransformation(start, update),
        batch=numbers((4, 8), 4),
        strategy=fsdp(min_size=0),
        owners=True,
    )
    step = spec.compile(mesh_of(fsdp=2))  # a momentum of f32 would change the types of the state
    after, _ = step(step.init(jax.random.key(0)), numbers((4, 8), 4))
    assert after.opt_state[0]["w"].dtype == jnp.bfloat16


def test_the_option_is_a_bool():
    with pytest.raises(sk.errors.StepError, match="owners  expected true or false"):
        spec_of(LAYERS, muon(LAYERS), fsdp(), owners="layers")
