"""The parity table: every strategy, on a mesh, held to one device and to the textbook.

A row is one line of `CASES`. What a row proves, at the cost of one compiled step: the first state
bit for bit; loss, metrics, gradient norm and every gradient leaf of step 1; the parameters after one
clipped SGD update, and after two; that later steps compile nothing; the layout of every leaf; and
the wire bytes of each mesh axis against the textbook minimum.

`python tests/_parity.py` runs every row and writes `docs/parity.md`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk
from shardkit.models import Decoder, DecoderConfig, decoder_loss
from shardkit.verify._compare import Limits, compare
from shardkit.verify._layout import declared_specs, differing_copies, misplaced
from shardkit.verify._observe import Observed, counted_compiles
from shardkit.verify._record import (
    GRADIENTS,
    INIT,
    LATER_STATE,
    SGD,
    Trial,
    host,
    of_steps,
)
from shardkit.verify._reference import Reference, nudged

data, fsdp, tensor, zero = (getattr(sk.strategies, n) for n in ("data", "fsdp", "tensor", "zero"))

ROWS, LENGTH, VOCAB = 16, 8, 40
SIZES = DecoderConfig(
    vocab=VOCAB, embed=16, layers=2, heads=4, mlp=24, dropout=0.1, z_loss=1e-3
)
# About half of the gradient's norm, so that the clip acts and needs the norm over all devices.
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
# Keeps the gradients as its state, so that the one compiled step shows them.
OPTIMIZER = optax.chain(optax.trace(0.0), CLIPPED)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      strategy: the layout.
      mesh: sizes of the axes.
      ratios: wire bytes over the textbook minimum, by axis, as the CPU compiler makes them.
      why: reason of each ratio above 1.1.
      accumulate, remat, precision: as for `compile_step`.
      model: changes to `SIZES`.
    """

    strategy: sk.Strategy
    mesh: Mapping[str, int]
    ratios: Mapping[str, float]
    why: str = ""
    accumulate: int | sk.Accumulate = 1
    remat: str = "none"
    precision: str = "float32"
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _case(strategy, mesh, ratios, why="", **options):
    return Case(strategy, mesh, ratios, why, **options)


CASES = {
    "data": _case(data(), {"data": 8}, {"data": 1.0}),
    "zero1": _case(zero(), {"data": 4}, {"data": 1.5}),
    "zero2": _case(zero(stage=2), {"data": 4}, {"data": 1.5}),
    "zero2 ×2": _case(zero(stage=2), {"data": 4}, {"data": 1.5}, accumulate=2),
    "zero2|tensor": _case(zero(stage=2)|tensor(), {"data": 2, "tensor": 4}, {"data": 1.5}),
    "zero2|fsdp": _case(zero(stage=2)|fsdp(), {"data": 2, "fsdp": 4}, {"data": 1.5}),
    "data|fsdp": _case(data()|fsdp(), {"data": 2, "fsdp": 4}, {"data": 1.5}),
}


def batches():
    """Two batches; half of the rows of each have no valid token, and the rest a different number."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        weights = rng.integers(0, 2, (ROWS, LENGTH)).astype(np.float32)
        weights[: ROWS // 2] = 0
        made.append({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return made


TRIAL = Trial(batches(), 2, jax.random.key(0))


@functools.cache
def model_of(changes):
    config = dataclasses.replace(SIZES, **dict(changes))
    return sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def _options(case):
    return {"accumulate": case.accumulate, "remat": case.remat, "precision": case.precision}


def mesh_of(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


@functools.cache
def compiled(name):
    """The step of a row."""
    case = CASES[name]
    model = model_of(tuple(case.model.items()))
    return sk.compile_step(
        model.loss_fn,
        OPTIMIZER,
        init=model.init,
        batch=TRIAL.batches[0],
        mesh=mesh_of(case.mesh),
        strategy=case.strategy,
        **_options(case),
    )


@functools.cache
def _reference(model, accumulate, precision):
    """What one device says, and again with every parameter nudged by one rounding.

    Rows that differ in strategy, mesh or remat alone share it.
    """
    for case in CASES.values():
        key = (tuple(case.model.items()), case.accumulate, case.precision)
        if key == (model, accumulate, precision):
            break
    step = compiled(next(name for name, other in CASES.items() if other is case))
    reference = Reference(step.declaration, jax.devices()[0])
    start = reference.start(TRIAL.key)
    record = reference.run(TRIAL, start, CLIPPED)
    dtype = jnp.dtype(step.declaration.precision.compute)
    noises = [reference.run(TRIAL, nudged(start, dtype, seed), CLIPPED) for seed in range(2)]
    return {**record, INIT: start.leaves()}, noises, Limits.of(dtype)


def observe(step):
    """Runs the two steps on the mesh; the optimizer's first state leaf group is the gradient."""
    state = step.init(TRIAL.key)
    specs = declared_specs(step.declaration, state)
    record = {INIT: _leaves(state)}
    state, first = step(state, TRIAL.batch(0))
    record |= {GRADIENTS: host(state.opt_state[0].trace), SGD: host(state.params)}
    with counted_compiles() as count:
        placed = step.put(TRIAL.batch(1))
        state, second = step(state, placed)
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    wrong = misplaced(parts, specs, step.mesh, "after two steps")
    record |= {**of_steps([first, second]), LATER_STATE: _leaves(state)}
    return Observed(record, tuple(wrong), tuple(differing_copies(parts)), count[0], 1)


def _leaves(state):
    found = {}
    for part in ("params", "opt_state", "extra"):
        found |= host(getattr(state, part), part)
    return found


@functools.cache
def certificate(name):
    """The rows of `sk.verify` for a case, from the one step."""
    case, step = CASES[name], compiled(name)
    key = tuple(case.model.items()), case.accumulate, case.precision
    reference, noises, limits = _reference(*key)
    rows = compare(name, observe(step), reference, noises, limits)
    return sk.Certificate(tuple(rows), name)


def ratios(name):
    """Wire bytes over the textbook minimum, by mesh axis."""
    minima = compiled(name).report().minima
    return {one.axis: round(one.ratio, 2) for one in minima if one.ratio is not None}


if __name__ == "__main__":
    import sys, time

    for name in sys.argv[1:] or CASES:
        t=time.process_time()
        step=compiled(name)
        print(name, time.process_time()-t)
        c=certificate(name)
        print(time.process_time()-t)
        print(c)
        print(ratios(name))
        r=step.report()
        print(r.memory)
        for f in r.findings: print(f)
        for row in r.ledger: 
            if row.payload_bytes>64: print("  ",row, row.operands[:6])
