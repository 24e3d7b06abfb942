"""The parity table: every strategy, on a mesh, held to one device and to the textbook.

A row is one line of `CASES`. What a row proves, at the cost of one compiled step: the first state
bit for bit; loss, metrics, gradient norm and every gradient leaf of step 1; the parameters after
one clipped SGD update and after two; that later steps compile nothing; the layout of every leaf;
and the wire bytes of each mesh axis against the textbook minimum.

`python benchmarks/parity.py` runs every row and writes `docs/parity.md`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.parity._compare import Limits, compare
from shardkit.parity._layout import declared_specs, differing_copies, misplaced
from shardkit.parity._observe import Observed, counted_compiles
from shardkit.parity._record import GRADIENTS, INIT, LATER_STATE, NORM, SGD, Trial, host, of_steps
from shardkit.parity._reference import Reference, nudged

data, fsdp, tensor, zero = (getattr(sk.strategies, n) for n in ("data", "fsdp", "tensor", "zero"))
pipeline = sk.strategies.pipeline
context = sk.strategies.context

ROWS, LENGTH, VOCAB = 16, 8, 40
SIZES = DecoderConfig(
    vocab=VOCAB, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, dropout=0.1, z_loss=1e-3
)
# Below the gradient's norm, so that the clip acts and needs the norm over all devices.
CLIP = 0.5
CLIPPED = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(1.0))
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
      accumulate, remat, precision, mode: as for `compile_step`.
      model: changes to `SIZES`.
    """

    strategy: sk.Strategy
    mesh: Mapping[str, int]
    ratios: Mapping[str, float]
    why: str = ""
    accumulate: int | sk.Accumulate = 1
    remat: str = "none"
    precision: str = "float32"
    mode: str = "auto"
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)


# What the CPU compiler does. On TPUs and GPUs see benchmarks/results/kinds_*.md.
SCATTER = "makes no reduce-scatter: whole arrays are reduced, then sliced"
EACH = (
    "sums the input's gradient of each product alone (q, k, v; gate, up); embedding and loss sum "
    "two activations more"
)
FLOATS = "sends bf16 as f32"
SWAP = "sends also the ring's swap for equal causal work, half of each block"
LOOP = "reduces gradients over context for each micro-batch"
MICRO = "gathers weights for each micro-batch"
BUBBLE = "sends over all boundaries of an exchange, wanted in that tick or not"
AGAIN = "computes a stage's forward pass, and what it sends, again in the backward pass"
# Fewer key heads than devices, biases, one table for embedding and head.
SHARED = {"kv_heads": 2, "bias": True, "tie_embeddings": True}
# A mixture of experts that drops a third of its choices, and one that drops none.
MIXTURE = {"experts": 8, "expert_mlp": 8, "capacity_factor": 1.0}
DROPLESS = {"experts": 8, "expert_mlp": 8, "shared_experts": 1}
LANE = "sums what is no expert's over `expert` in each micro-batch"
ROOM = "pads what goes to each device to the room for all tokens, and sums each choice's part"
# So many layers that what embedding and loss send beside them does not show.
DEEP = {"num_layers": 16}
ENDS = "sends two activations more for embedding and loss, beside only two layers"
TIED = {"tie_embeddings": True, "bias": True, "loss_chunks": 2}
EACH_OF_2 = sk.Accumulate(2, "every")
MANUAL = {"mode": "shard_map"}
KEPT = fsdp(reshard_after_forward=False)
GROUPS = functools.partial(tensor, kv_heads="replicate")
BF16 = {"accumulate": 2, "precision": "bfloat16"}

# The ledger of a row is fixed to two places: a change of it is a change of what is sent.
CASES = {
    "data": Case(data(), {"data": 8}, {"data": 1.0}),
    "data ×2 bf16": Case(data(), {"data": 4}, {"data": 2.0}, FLOATS, **BF16),
    "zero1": Case(zero(), {"data": 4}, {"data": 1.5}, SCATTER),
    "zero2 ×2": Case(zero(stage=2), {"data": 4}, {"data": 1.5}, SCATTER, accumulate=2),
    "zero1 tensor": Case(
        zero() | tensor(),
        {"data": 2, "tensor": 4},
        {"data": 1.51, "tensor": 2.27},
        f"{SCATTER}; {EACH}",
        remat="dots",
    ),
    "zero2 fsdp": Case(
        zero(stage=2) | fsdp(), {"data": 2, "fsdp": 4}, {"data": 1.46, "fsdp": 1.26}, SCATTER
    ),
    "fsdp": Case(fsdp(), {"fsdp": 8}, {"fsdp": 1.26}, SCATTER),
    "fsdp kept": Case(KEPT, {"fsdp": 4}, {"fsdp": 1.49}, SCATTER, remat="full"),
    "hsdp": Case(data() | fsdp(), {"data": 2, "fsdp": 4}, {"data": 0.96, "fsdp": 1.26}, SCATTER),
    "tensor": Case(GROUPS(), {"tensor": 4}, {"tensor": 1.69}, EACH, model=SHARED),
    "sequence": Case(
        GROUPS(sequence=True), {"tensor": 4}, {"tensor": 2.32}, f"{SCATTER}; {EACH}", model=SHARED
    ),
    "data sequence": Case(
        data() | tensor(sequence=True),
        {"data": 4, "tensor": 2},
        {"data": 1.0, "tensor": 3.17},
        f"{SCATTER}; {EACH}; repeats forward sums under full remat",
        remat="full",
    ),
    "fsdp sequence ×2": Case(
        fsdp() | tensor(sequence=True),
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 1.76, "tensor": 2.69},
        f"{SCATTER}; {EACH}; {MICRO}",
        accumulate=2,
    ),
    "all ×2 bf16": Case(
        data() | fsdp() | tensor(),
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1.95, "fsdp": 3.52, "tensor": 4.05},
        f"{SCATTER}; {EACH}; {MICRO}; {FLOATS}",
        **BF16,
    ),
    "pipeline data tensor": Case(
        data() | pipeline(micro_batches=4) | tensor(),
        {"data": 2, "pipe": 2, "tensor": 2},
        {"data": 0.82, "pipe": 1.15, "tensor": 2.52},
        f"{BUBBLE}; {EACH}",
        remat="full",
    ),
    "zero bubble fsdp": Case(
        fsdp() | pipeline(schedule="zero_bubble", micro_batches=4),
        {"fsdp": 2, "pipe": 2},
        {"fsdp": 1.0, "pipe": 1.61},
        BUBBLE,
    ),
    "pipeline data bf16": Case(
        data() | pipeline(micro_batches=2),
        {"data": 4, "pipe": 2},
        {"data": 1.63, "pipe": 2.29},
        f"{BUBBLE}; {FLOATS}",
        precision="bfloat16",
    ),
    "pipeline sequence each ×2": Case(
        data() | pipeline(micro_batches=2) | tensor(sequence=True),
        {"data": 2, "pipe": 2, "tensor": 2},
        {"data": 1.78, "pipe": 1.06, "tensor": 3.12},
        f"reduces gradients in each micro-batch, as declared; {SCATTER}; {EACH}",
        accumulate=EACH_OF_2,
        model=TIED,
    ),
    "pipeline fsdp tensor, of experts": Case(
        fsdp() | pipeline(micro_batches=4) | tensor(),
        {"fsdp": 2, "pipe": 2, "tensor": 2},
        {"fsdp": 1.01, "pipe": 1.22, "tensor": 3.15},
        f"{BUBBLE}; {EACH}",
        model=MIXTURE,
    ),
    "pipeline ring experts": Case(
        pipeline(micro_batches=2) | context() | sk.strategies.expert(),
        {"pipe": 2, "context": 2, "expert": 2},
        {"pipe": 1.19, "context": 1.55, "expert": 1.92},
        f"{BUBBLE}; {SWAP}; {LOOP}; {LANE}; {AGAIN}",
        model=MIXTURE,
    ),
    "pipeline tensor all_to_all": Case(
        pipeline(micro_batches=2) | context(attention="all_to_all") | tensor(),
        {"pipe": 2, "context": 2, "tensor": 2},
        {"pipe": 1.31, "context": 1.77, "tensor": 2.52},
        f"{BUBBLE}; {EACH}; {LOOP}; {AGAIN}",
        remat="full",
    ),
    "pipeline experts sequence": Case(
        pipeline(micro_batches=2) | sk.strategies.expert() | tensor(sequence=True),
        {"pipe": 2, "expert": 2, "tensor": 2},
        {"pipe": 0.89, "expert": 1.73, "tensor": 4.92},
        f"{BUBBLE}; {LANE}; {AGAIN}; {SCATTER}; {EACH}",
        remat="full",
        model=MIXTURE,
    ),
    "ring": Case(context(), {"context": 4}, {"context": 1.16}, SWAP),
    "ring fsdp sequence": Case(
        fsdp() | context() | tensor(sequence=True),
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"fsdp": 1.25, "context": 1.75, "tensor": 3.17},
        f"{SWAP}; {SCATTER}; {EACH}; repeats forward sums and the ring under full remat",
        remat="full",
    ),
    "all_to_all data ×2 bf16": Case(
        data() | context(attention="all_to_all"),
        {"data": 2, "context": 4},
        {"data": 2.0, "context": 3.49},
        f"{FLOATS}; {LOOP}",
        **BF16,
    ),
    "experts": Case(sk.strategies.expert(), {"expert": 8}, {"expert": 1.0}, model=MIXTURE),
    "experts fsdp ×2": Case(
        fsdp() | sk.strategies.expert(),
        {"fsdp": 2, "expert": 4},
        {"fsdp": 1.74, "expert": 2.4},
        f"{SCATTER}; {MICRO}; {LANE}",
        accumulate=2,
        model=MIXTURE,
    ),
    "data experts sequence": Case(
        data() | sk.strategies.expert() | tensor(sequence=True),
        {"data": 2, "expert": 2, "tensor": 2},
        {"data": 0.7, "expert": 1.65, "tensor": 5.93},
        f"{SCATTER}; {EACH}; {ROOM}",
        model=DROPLESS,
    ),
    "shard_map data": Case(data(), {"data": 8}, {"data": 1.0}, **MANUAL),
    "shard_map fsdp": Case(fsdp(), {"fsdp": 8}, {"fsdp": 0.93}, **MANUAL),
    "shard_map fsdp kept": Case(KEPT, {"fsdp": 4}, {"fsdp": 1.0}, remat="full", **MANUAL),
    "shard_map zero1": Case(zero(), {"data": 4}, {"data": 1.0}, **MANUAL),
    "shard_map data sequence ×2": Case(
        data() | tensor(sequence=True),
        {"data": 2, "tensor": 4},
        {"data": 0.96, "tensor": 1.04},
        accumulate=2,
        model=DEEP,
        **MANUAL,
    ),
    "shard_map fsdp sequence ×2": Case(
        fsdp() | tensor(sequence=True),
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 0.67, "tensor": 1.04},
        accumulate=2,
        model=DEEP,
        **MANUAL,
    ),
    "shard_map all ×2": Case(
        data() | fsdp() | tensor(),
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 0.97, "fsdp": 0.67, "tensor": 1.03},
        accumulate=2,
        model=DEEP,
        **MANUAL,
    ),
    "shard_map tied each ×2": Case(
        fsdp() | tensor(sequence=True),
        {"fsdp": 2, "tensor": 4},
        {"fsdp": 1.87, "tensor": 1.66},
        f"{MICRO}; repeats gathers and sums under full remat; {ENDS}",
        accumulate=EACH_OF_2,
        remat="full",
        model=TIED,
        **MANUAL,
    ),
    "shard_map all bf16": Case(
        data() | fsdp() | tensor(sequence=True),
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1.92, "fsdp": 1.85, "tensor": 2.57},
        f"{FLOATS}; {ENDS}",
        precision="bfloat16",
        **MANUAL,
    ),
}
# Largest error of a bf16 gradient leaf that was measured between correct meshes.
BF16_NOISE = 6.5e-2


def batches():
    """Two batches; half of the rows have no valid token, the others each a number of their own."""
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
    return {name: getattr(case, name) for name in ("accumulate", "remat", "precision", "mode")}


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


def alike(case):
    """What the reference depends on: rows that differ in anything else share it."""
    return tuple(case.model.items()), case.accumulate, case.precision


@functools.cache
def _reference(shared):
    """What one device says, and again with every parameter nudged by one rounding."""
    spec = compiled(next(n for n, c in CASES.items() if alike(c) == shared)).spec
    reference = Reference(spec, jax.devices()[0])
    start = reference.start(TRIAL.key)
    record = reference.run(TRIAL, start, CLIPPED)
    assert CLIP < float(record[NORM]["grad_norm"]), "the clip does not act"
    dtype = jnp.dtype(spec.precision.compute_dtype)
    noises = [reference.run(TRIAL, nudged(start, dtype, seed), CLIPPED) for seed in range(2)]
    return record, noises, Limits.of(dtype)


def observe(step):
    """Runs two steps on the mesh; the first part of the optimizer's state is the gradient."""
    state = step.init(TRIAL.key)
    specs = declared_specs(step.spec, step.mesh, state)
    record = {INIT: _leaves(state)}
    state, first = step(state, TRIAL.batch(0))
    record |= {GRADIENTS: host(state.opt_state[0].trace), SGD: host(state.params)}
    with counted_compiles() as count:
        placed = step.shard_batch(TRIAL.batch(1))
        state, second = step(state, placed)
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    wrong = misplaced(parts, specs, step.mesh, "after two steps")
    record |= {**of_steps([first, second]), LATER_STATE: _leaves(state)}
    return Observed(record, tuple(wrong), tuple(differing_copies(parts)), count[0], 1)


def _leaves(state):
    found = {}
    for part in ("params", "opt_state", "model_state"):
        found |= host(getattr(state, part), part)
    return found


@functools.cache
def observed(name):
    return observe(compiled(name))


def certificate(name, found=None):
    """The rows of `sk.verify` for a case, from the one step; or for `found` in place of it."""
    reference, noises, limits = _reference(alike(CASES[name]))
    rows = compare(name, found or observed(name), reference, noises, limits)
    return sk.ParityReport(tuple(rows), name)


def ratios(name):
    """Wire bytes over the textbook minimum, by mesh axis."""
    minima = compiled(name).report().minima
    return {one.axis: round(one.ratio, 2) for one in minima if one.ratio is not None}
