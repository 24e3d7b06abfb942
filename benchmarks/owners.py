"""What muon sends with owners of whole matrices, and with every product made of split operands.

`cd benchmarks; python owners.py` compiles the reference decoder, 8 layers × 128, for 8 simulated
CPU devices, and the update of Llama-2-7B's hidden matrices for `tpu:v5p:2x2x2` and `gpu:h100:1x8`
where their compilers are installed. Writes `benchmarks/results/owners.{json,md}`. The claim: moves
of whole matrices send at most twice the least, 2 (n−1)/n of the matrices of one device.
"""

import argparse
import importlib.util
from typing import Any

import _harness

SPLIT, OWNERS = "muon, split products", "muon, owners"
# What is compared, the mesh, optimizers, and the fields of the config.
CASES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("8 layers", "fsdp=8", ("adamw", SPLIT, OWNERS), ("strategy=fsdp",)),
    ("6 layers", "fsdp=8", (OWNERS,), ("strategy=fsdp", "model.num_layers=6")),
    ("8 layers", "fsdp=4,tensor=2", (SPLIT, OWNERS), ("strategy=fsdp|tensor",)),
    ("8 layers", "data=8", (OWNERS,), ("strategy=zero",)),
    (
        "8 layers, 4 experts",
        "fsdp=4,expert=2",
        (OWNERS,),
        ("strategy=fsdp|expert", "model.experts=4", "model.expert_mlp=192"),
    ),
)
SIZES = ("model.num_layers=8", "model.embed_dim=128", "data.seq_len=64", "data.batch_size=16")
LAYERS, DIM, MLP, HEADS = 32, 4096, 11008, 32
# The module of each compiler, and what it compiles for.
TARGETS = {"libtpu": "tpu:v5p:2x2x2", "jax_cuda13_plugin": "gpu:h100:1x8"}


def llama_update(owners: bool) -> Any:
    """Muon's update of the hidden matrices of Llama-2-7B, whose gradients are the parameters."""
    import jax
    import jax.numpy as jnp
    from optax import contrib

    import shardkit as sk

    rows = contrib.MuonDimensionNumbers(1, (2, 3)), contrib.MuonDimensionNumbers((1, 2), 3)
    flat = contrib.MuonDimensionNumbers(1, 2)
    heads = ((DIM, HEADS, DIM // HEADS), ("embed", "heads", None), rows[0])
    leaves = {
        **dict.fromkeys(("query", "key", "value"), heads),
        "out": ((HEADS, DIM // HEADS, DIM), ("heads", None, "embed"), rows[1]),
        **dict.fromkeys(("gate", "up"), ((DIM, MLP), ("embed", "mlp"), flat)),
        "down": ((MLP, DIM), ("mlp", "embed"), flat),
    }

    def init(key: Any) -> Any:
        keys = jax.random.split(key, len(leaves))
        return {
            name: sk.WithAxes(jax.random.normal(k, (LAYERS, *shape)), ("layers", *axes))
            for k, (name, (shape, axes, _)) in zip(keys, leaves.items(), strict=True)
        }

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        return jnp.mean(batch["x"]) * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    dims = {name: numbers for name, (_, _, numbers) in leaves.items()}
    spec = sk.StepSpec(
        loss_fn=loss_fn,
        optimizer=contrib.muon(0.02, muon_weight_dimension_numbers=dims),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((8,), jnp.float32)},
        strategy=sk.strategies.fsdp(),
        owners=owners,
    )
    return spec, sk.MeshSpec(fsdp=8)


def compiled(name: str, mesh: str, fields: tuple[str, ...], optimizer: str) -> dict[str, Any]:
    """The decoder's row."""
    from shardkit._core.scope_markers import OWNED
    from shardkit._core.tracing import recorded_facts
    from shardkit.config import load_config

    overrides = (*SIZES, *fields, f"mesh={mesh}", f"optimizer.name={optimizer.split(',')[0]}")
    config = load_config(None, overrides)
    spec = config.step_spec().replace(owners=optimizer != SPLIT)
    step = spec.compile(config.mesh.build(config.devices))
    facts: Any = recorded_facts(step.program.jaxpr.jaxpr, OWNED)
    least = sum(size for fact in facts for _, size in fact)
    return row_of(f"decoder, {name}", mesh, optimizer, step.report(), least)


def row_of(what: str, mesh: str, optimizer: str, report: Any, least: float) -> dict[str, Any]:
    """What a report says of the optimizer; `least`: bytes to move its matrices."""
    rows = [row for row in report.ledger if row.by_optimizer]
    moved = sum(row.wire_bytes for row in rows if row.moves_matrices)
    return {
        "what": what,
        "mesh": mesh,
        "optimizer": optimizer,
        "sent (MiB)": round(report.ledger.total() / 2**20, 2),
        "by the optimizer": round(sum(row.wire_bytes for row in rows) / 2**20, 2),
        "least for whole matrices": round(least / 2**20, 2) if moved else "",
        "moves ÷ least": round(moved / least, 2) if moved else "",
        "temporaries (MiB)": round((report.memory.temp or 0) / 2**20, 1),
        "compile (s)": round(report.seconds["compile"], 1),
    }


def llama_rows(target: str) -> list[dict[str, Any]]:
    """Llama-2-7B's hidden matrices, compiled for absent devices."""
    from shardkit.targets import StepSource, compile_for

    rows, reports = [], {}
    for how in (SPLIT, OWNERS):
        source = StepSource("owners:llama_update", arguments={"owners": how == OWNERS})
        reports[how] = compile_for(source, target)
        # The two differ in the minimum by what the moves need.
        split, owned = (sum(m.bytes for m in reports[h].minima) for h in (SPLIT, how))
        what = f"Llama-2-7B's matrices, {target}"
        rows.append(row_of(what, "fsdp=8", how, reports[how], owned - split))
    return rows


def main() -> None:
    """Compiles every case and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    import shardkit as sk

    sk.simulate_devices(8)
    rows = []
    for name, mesh, optimizers, fields in CASES:
        for how in optimizers:
            save([*rows, row := compiled(name, mesh, fields, how)])
            rows.append(row)
    for compiler, target in TARGETS.items():
        if importlib.util.find_spec(compiler):
            save(rows := [*rows, *llama_rows(target)])


def save(rows: list[dict[str, Any]]) -> None:
    """Writes the rows so far: the TPU compiler takes minutes."""
    note = (
        "Bytes that one device sends per step, as compiled. `least`: (n−1)/n of the matrices that "
        "one device holds, each way; more where layers are filled up to a multiple of the devices."
    )
    where = "8 devices, simulated CPU unless a target is named"
    _harness.write("owners", "compiled", where, rows, note)


if __name__ == "__main__":
    main()
