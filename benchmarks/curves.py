"""The same run with every kind of parallelism: the loss curves lie on one another.

    python benchmarks/curves.py [--steps 60] [NAME ...]
    python benchmarks/curves.py --again [NAME ...]

Curves of the same number of steps that are there already are kept, unless they are asked for again.

A small decoder learns the default corpus on one device and on eight simulated ones, laid out by
each kind in turn, from the same seed and the same rows in the same order. What is written is the
loss of every step, its distance from one device, and a plot. Needs `pip install "shardkit[plot]"`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _harness
import jax

import shardkit as sk
from shardkit.config import load_config
from shardkit.data import load_text
from shardkit.lm import batch_shapes, decoder_model

NAME = "curves"
COMMON = (
    "model=nano",
    "model.kv_heads=4",
    "data.seq_len=64",
    "data.batch_size=16",
    "optimizer.name=adamw",
    "optimizer.lr=3e-3",
)
EXPERTS = ("model=nano-moe",)
# Name → what is laid out how; the reference of each is the same model on one device.
KINDS: Mapping[str, tuple[str, ...]] = {
    "one device": ("mesh=data=1", "strategy=data"),
    "data": ("mesh=data=8", "strategy=data"),
    "data, accumulate 2": ("mesh=data=8", "strategy=data", "strategy.accumulate=2"),
    "ZeRO-1": ("mesh=data=8", "strategy=zero(stage=1)"),
    "ZeRO-2": ("mesh=data=8", "strategy=zero(stage=2)"),
    "fsdp": ("mesh=fsdp=8", "strategy=fsdp"),
    "HSDP": ("mesh=data=2,fsdp=4", "strategy=data|fsdp"),
    "tensor": ("mesh=data=2,tensor=4", "strategy=data|tensor"),
    "tensor + sequence": ("mesh=fsdp=2,tensor=4", "strategy=fsdp|tensor(sequence=True)"),
    "context, ring": ("mesh=data=2,context=4", "strategy=data|context"),
    "context, all-to-all": (
        "mesh=data=2,context=4",
        "strategy=data|context(attention='all_to_all')",
    ),
    "pipeline, 1F1B": (
        "mesh=data=2,pipe=2,tensor=2",
        "strategy=data|pipeline(micro_batches=4)|tensor",
    ),
    "shard_map mode": (
        "mesh=fsdp=2,tensor=4",
        "strategy=fsdp|tensor(sequence=True)",
        "compile.mode=shard_map",
    ),
    "experts, one device": (*EXPERTS, "mesh=data=1", "strategy=data"),
    "experts": (*EXPERTS, "mesh=data=2,expert=2,tensor=2", "strategy=data|expert|tensor"),
}


def curve(name: str, steps: int) -> list[float]:
    """Trains one layout and returns the loss of every step, in nats."""
    # A mesh and a model are replaced as a whole, so they come before their own fields.
    fields = sorted((*COMMON, *KINDS[name]), key=lambda one: one.partition("=")[0].count("."))
    own = [one for one in fields if not (one.startswith("model.") and "model=nano-moe" in fields)]
    config = load_config(None, own)
    text, model = load_text(config.data), decoder_model(config.model)
    sizes = dict(config.mesh.sizes)
    count = 1
    for size in sizes.values():
        count *= size
    step = sk.compile_step(
        model.loss_fn,
        config.optimizer.build(steps),
        init=model.init,
        batch=batch_shapes(config.data),
        mesh=config.mesh.build(devices=jax.devices()[:count]),
        strategy=config.strategy,
        **config.compile.arguments,
    )
    state, losses = step.init(jax.random.key(config.train.seed)), []
    for i in range(steps):
        state, metrics = step(state, step.shard_batch(text.batch(i)))
        losses.append(float(metrics["loss"]))
    return losses


def reference(name: str) -> str:
    """The layout on one device that another one is held against."""
    return "experts, one device" if name.startswith("experts") else "one device"


def row(name: str, curves: Mapping[str, list[float]]) -> dict[str, Any]:
    """Distance of one curve from its reference."""
    pairs = list(zip(curves[name], curves[reference(name)], strict=True))
    apart = [abs(one - other) / other for one, other in pairs]
    return {
        "kind": name,
        # A bar would end the cell of the table.
        "layout": ", ".join(o for o in KINDS[name] if not o.startswith("model")).replace(
            "|", "\\|"
        ),
        "first loss": round(curves[name][0], 5),
        "last loss": round(curves[name][-1], 5),
        "step 1 apart": f"{apart[0]:.1e}",
        "most apart": f"{max(apart):.1e}",
    }


def plot(curves: Mapping[str, list[float]], path: Path) -> None:
    """Draws all curves, and beneath them how far each is from one device's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = NAME
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True)
    for name, losses in curves.items():
        steps = range(1, len(losses) + 1)
        alone = name.endswith("one device")
        style = {"color": "black", "linewidth": 2.5} if alone else {"linewidth": 1.0}
        upper.plot(steps, losses, label=name, **style)
        if not alone:
            pairs = zip(losses, curves[reference(name)], strict=True)
            lower.plot(steps, [abs(a - b) / b + 1e-9 for a, b in pairs], label=name, linewidth=1.0)
    upper.set_ylabel("loss, nats a byte")
    upper.set_title("The default corpus, by kind of parallelism, on 8 simulated devices")
    upper.legend(fontsize=8, ncols=2)
    lower.set_yscale("log")
    lower.set_ylabel("distance from one device, relative")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Trains every kind and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(KINDS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    sk.simulate_devices(8)
    there = _harness.RESULTS / f"{NAME}_losses.json"
    kept = json.loads(there.read_text()) if there.exists() else {}
    kept = {name: losses for name, losses in kept.items() if len(losses) == arguments.steps}
    for name in arguments.names:
        if arguments.again or name not in kept:
            kept[name] = curve(name, arguments.steps)
            there.write_text(json.dumps(kept) + "\n")
            print(name, kept[name][0], kept[name][-1], flush=True)
    curves = {name: kept[name] for name in KINDS if name in kept}
    rows = [row(name, curves) for name in curves]
    note = "Losses are of the float32 step, the batch the same rows everywhere; adamw."
    _harness.write(NAME, "measured", "8 simulated CPU devices", rows, note)
    plot(curves, _harness.RESULTS / f"{NAME}.svg")


if __name__ == "__main__":
    main()
