"""The ledgers of both modes side by side, per strategy, compiled for 8 simulated devices.

`python benchmarks/modes.py` writes `benchmarks/results/modes.{json,md}` and the table of
`docs/modes.md`. It compiles and runs nothing, so it claims no times.
"""

import math
from pathlib import Path
from typing import Any

import _harness

PAGE = Path(__file__).parent.parent / "docs" / "modes.md"
MARK = "<!-- the table that benchmarks/modes.py writes -->"
LAYERS, ROWS, LENGTH = 24, 16, 32
SIZES = {"data": 8}, {"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "tensor": 4}
# Below this many bytes a collective carries a few numbers: losses, weights, norms.
SCALARS = 128


def compiled(strategy: Any, sizes: dict[str, int], mode: str) -> Any:
    """The report of a decoder's step."""
    import jax
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit.lm import Decoder, DecoderConfig, decoder_loss

    config = DecoderConfig(vocab=64, embed_dim=32, num_layers=LAYERS, num_heads=4, mlp_dim=96)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": np.ones((ROWS, LENGTH), np.float32)}
    return sk.compile_step(
        model.loss_fn,
        optax.adamw(1e-3),
        init=model.init,
        batch=batch,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())]),
        strategy=strategy,
        mode=mode,
    ).report()


def rows_of(name: str, mode: str, report: Any) -> list[dict[str, Any]]:
    """One row per mesh axis: what is sent over it, beside the minimum of its kind."""
    found = []
    for least in report.minima:
        own = [r for r in report.ledger.where(least.axis) if r.payload_bytes >= SCALARS]
        kinds = {}
        for row in own:
            kinds[row.kind] = kinds.get(row.kind, 0) + (row.trips or 1) * len(row.operands)
        found.append(
            {
                "strategy": name,
                "mesh axis": least.axis,
                "mode": mode,
                "arrays sent per step": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
                "wire bytes": least.wire,
                "minimum": round(least.bytes),
                "ratio": None if least.ratio is None else round(least.ratio, 3),
            }
        )
    return found


def main() -> None:
    """Compiles every strategy in both modes and writes the tables."""
    import shardkit as sk

    sk.simulate_devices(8)
    made = sk.strategies
    strategies = {
        "data": made.data(),
        "fsdp": made.fsdp(),
        "data × tensor": made.data() | made.tensor(),
        "data × tensor+sequence": made.data() | made.tensor(sequence=True),
    }
    rows = []
    for (name, strategy), sizes in zip(strategies.items(), SIZES, strict=True):
        for mode in ("auto", "shard_map"):
            rows += rows_of(name, mode, compiled(strategy, sizes, mode))
    rows.sort(key=lambda row: (list(strategies).index(row["strategy"]), row["mesh axis"]))
    note = (
        f"A decoder of {LAYERS} layers, width 32, on {ROWS} rows of {LENGTH} tokens, f32; bytes "
        "that one device sends per step on a ring; collectives of a few numbers are left out of "
        "the counts."
    )
    path = _harness.write("modes", "compiled", "CPU, 8 simulated devices", rows, note)
    table = path.with_suffix(".md").read_text()
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n" + "\n".join(table.splitlines()[2:]) + "\n")


if __name__ == "__main__":
    main()
