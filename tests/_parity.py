"""The parity table: every strategy on a mesh, compared with one device and with the textbook.

A row is one entry of `CASES`. It proves, at the cost of one compiled step: the first state
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
from shardkit.parity._compare import ErrorLimits, compare_with_reference
from shardkit.parity._layout import (
    find_differing_copies,
    find_misplaced_leaves,
    resolve_declared_specs,
)
from shardkit.parity._nudges import nudge_params
from shardkit.parity._observe import Observation, count_compiles, state_fields
from shardkit.parity._record import (
    GRADIENTS,
    INIT,
    LATER_STATE,
    NORM,
    SGD,
    ParityInputs,
    copy_state_to_host,
    copy_to_host,
    group_metrics_by_check,
)
from shardkit.parity._reference import Reference

data, fsdp, tensor, zero = (getattr(sk.strategies, n) for n in ("data", "fsdp", "tensor", "zero"))
pipeline = sk.strategies.pipeline
context = sk.strategies.context

ROWS, LENGTH, VOCAB = 16, 8, 40
SIZES = DecoderConfig(
    vocab=VOCAB, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, dropout=0.1, z_loss=1e-3
)
# Less than the gradient's norm, so that the clip is active and needs the norm over all devices.
CLIP = 0.5
CLIPPED = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(1.0))
# Its state is the gradients, so that one compiled step shows them.
OPTIMIZER = optax.chain(optax.trace(0.0), CLIPPED)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      strategy: the layout.
      mesh: sizes of the axes.
      ratios: wire bytes over the textbook minimum, by axis, as the CPU compiler makes them.
      why: the reason for each ratio above 1.1.
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
OTHERS = "sums the gradients of other weights over `expert` in each micro-batch"
ROOM = "pads what goes to each device to the room for all tokens, and sums each choice's part"
# Enough layers that the bytes of embedding and loss do not show.
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
        f"{BUBBLE}; {SWAP}; {LOOP}; {OTHERS}; {AGAIN}",
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
        f"{BUBBLE}; {OTHERS}; {AGAIN}; {SCATTER}; {EACH}",
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
        f"{SCATTER}; {MICRO}; {OTHERS}",
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
# Largest error of a bf16 gradient leaf measured between correct meshes.
BF16_NOISE = 6.5e-2


def batches():
    """Two batches. Half of the rows have no valid token; the others have different numbers."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(2):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        weights = rng.integers(0, 2, (ROWS, LENGTH)).astype(np.float32)
        weights[: ROWS // 2] = 0
        out.append({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return out


INPUTS = ParityInputs(batches(), 2, jax.random.key(0))


@functools.cache
def build_model(changes):
    config = dataclasses.replace(SIZES, **dict(changes))
    return sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def build_mesh(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


@functools.cache
def compile_case(name):
    """The step of a row."""
    case = CASES[name]
    model = build_model(tuple(case.model.items()))
    return sk.compile_step(
        model.loss_fn,
        OPTIMIZER,
        init=model.init,
        batch=INPUTS.batches[0],
        mesh=build_mesh(case.mesh),
        strategy=case.strategy,
        accumulate=case.accumulate,
        remat=case.remat,
        precision=case.precision,
        mode=case.mode,
    )


def reference_key(case):
    """What the reference depends on: rows with the same key share it."""
    return tuple(case.model.items()), case.accumulate, case.precision


@functools.cache
def _run_reference(key):
    """The record of one device, and its records with every parameter nudged by one rounding."""
    spec = compile_case(next(n for n, c in CASES.items() if reference_key(c) == key)).spec
    reference = Reference(spec, jax.devices()[0])
    start = reference.init(INPUTS.key)
    record = reference.run(INPUTS, start, CLIPPED)
    assert CLIP < float(record[NORM]["grad_norm"]), "the clip does not act"
    dtype = jnp.dtype(spec.precision.compute_dtype)
    nudged = [nudge_params(start.params, dtype, seed) for seed in range(2)]
    noise_records = [
        reference.run(INPUTS, dataclasses.replace(start, params=params), CLIPPED)
        for params in nudged
    ]
    return record, noise_records, ErrorLimits.of(dtype)


@functools.cache
def observe_case(name):
    """Runs two steps on the mesh; the first part of the optimizer's state is the gradient."""
    step = compile_case(name)
    state = step.init(INPUTS.key)
    specs = resolve_declared_specs(step.spec, step.mesh, state)
    record = {INIT: copy_state_to_host(state)}
    state, first = step(state, INPUTS.batch(0))
    record |= {GRADIENTS: copy_to_host(state.opt_state[0].trace), SGD: copy_to_host(state.params)}
    with count_compiles() as compiles:
        batch = step.shard_batch(INPUTS.batch(1))
        state, second = step(state, batch)
    fields = state_fields(state)
    record |= {**group_metrics_by_check([first, second]), LATER_STATE: copy_state_to_host(state)}
    return Observation(
        record,
        misplaced_leaves=tuple(find_misplaced_leaves(fields, specs, step.mesh, "after two steps")),
        differing_copies=tuple(find_differing_copies(fields)),
        later_calls=1,
        later_compiles=compiles[0],
    )


def parity_report(name, observation=None):
    """The rows of `sk.verify` for a case, from its one step; or from another observation."""
    record, noise_records, limits = _run_reference(reference_key(CASES[name]))
    observation = observation or observe_case(name)
    rows = compare_with_reference(name, observation, record, noise_records, limits)
    return sk.ParityReport(tuple(rows), name)


def ratios(name):
    """Wire bytes over the textbook minimum, by mesh axis."""
    minima = compile_case(name).report().minima
    return {row.axis: round(row.ratio, 2) for row in minima if row.ratio is not None}
