"""One training step of the reference decoder on a CPU, against plain JAX and torch.

    python benchmarks/cpu_decoder.py [--turns 12] [--keep-memory]

dim 256, 4 layers, 8 heads, ff 688, vocabulary 8192, 16 × 256 tokens, fp32, AdamW; all start from
the same weights, and every contestant's losses must agree. Rows that say simulated run on 8
simulated devices of the same cores, 2×4 is data=2 × tensor=4: they show overhead, never a speed-up.

`--keep-memory` tells the allocator, for all contestants alike, to keep what is freed: see
`_harness.keep_freed_memory`. Without it a JAX step spends part of its time on page faults.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import _harness

ROWS, LENGTH = 16, 256
Step = Callable[[], float]


def make_batch(vocab: int) -> dict[str, Any]:
    """Random tokens, every weight 1."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = np.ones((ROWS, LENGTH), np.float32)
    return {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "weights": weights}


def shardkit_step(config: Any, batch: Any, mesh: Any, strategy: Any) -> tuple[Step, Any]:
    """`compile_step` on a mesh; and its first weights."""
    import jax
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit.lm import Decoder, decoder_loss

    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    compiled = sk.compile_step(
        model.loss_fn,
        optax.adamw(1e-3),
        init=model.init,
        batch=batch,
        mesh=mesh.build(devices=jax.devices()[: mesh.size]),
        strategy=strategy,
    )
    state = compiled.init(jax.random.key(0))
    weights = jax.tree.map(np.array, state.params)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return step, weights


def plain_step(weights: Any, batch: Any, devices: list[Any]) -> Step:
    """`jax.jit` by hand, on one device or with specs written out for data=2 × tensor=4."""
    import _plain_decoder as plain
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.asarray(devices).reshape((2, 4) if len(devices) > 1 else (1, 1)), ("d", "t"))
    specs = {"gate": P(None, None, "t"), "up": P(None, None, "t"), "down": P(None, "t")}
    specs |= {"query": P(None, None, "t"), "key": P(None, None, "t"), "value": P(None, None, "t")}
    specs |= {"out": P(None, "t"), "head": P(None, "t"), "embedding": P("t")}

    def place(path: Any, x: Any) -> Any:
        spec = next((s for n, s in specs.items() if n == path[-1].key), P())
        return jax.device_put(x, NamedSharding(mesh, spec))

    optimizer = optax.adamw(1e-3)
    params = jax.tree_util.tree_map_with_path(place, weights)
    moments = jax.jit(optimizer.init)(params)
    placed = jax.device_put(batch, NamedSharding(mesh, P("d")))

    def update(params: Any, moments: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(plain.loss)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal params, moments
        params, moments, loss = compiled(params, moments, placed)
        return float(loss)

    return step


def contestants() -> dict[str, Step]:
    """Every step that can run here, compiled and started from the same weights."""
    import jax

    import shardkit as sk
    from shardkit.lm import SIZES

    config, data, tensor = SIZES["tiny"], sk.strategies.data(), sk.strategies.tensor()
    batch, devices = make_batch(config.vocab), jax.devices()
    ours, weights = shardkit_step(config, batch, sk.MeshSpec(data=1), data)
    fsdp, _ = shardkit_step(config, batch, sk.MeshSpec(fsdp=8), sk.strategies.fsdp())
    many, _ = shardkit_step(config, batch, sk.MeshSpec(data=2, tensor=4), data | tensor)
    steps = {
        "plain JAX": plain_step(weights, batch, devices[:1]),
        "shardkit": ours,
        "plain JAX 2×4 simulated": plain_step(weights, batch, devices),
        "shardkit 2×4 simulated": many,
        "shardkit fsdp=8 simulated": fsdp,
    }
    if importlib.util.find_spec("torch"):
        import _torch_decoder

        for name, compiled in (("torch eager", False), ("torch compiled", True)):
            steps[name] = _torch_decoder.training(config, weights, batch, compiled)
    return steps


def main() -> None:
    """Compiles, checks that losses agree, times, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--keep-memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        _harness.keep_freed_memory()
    import shardkit as sk

    sk.simulate_devices(8)
    steps = contestants()
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        losses[name] += [step(), step()]
    want = losses["plain JAX"]
    for name, got in losses.items():
        worst = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
        assert worst < 1e-4, f"{name}: losses {got}, plain JAX {want}"
    times = _harness.interleave(steps, arguments.turns)
    base = times["plain JAX"]
    rows = [
        {
            "contestant": name,
            "ms per step": round(t.median * 1e3, 1),
            "quartiles": f"{t.low * 1e3:.0f}-{t.high * 1e3:.0f}",
            "speed vs plain JAX": round(base.median / t.median, 2),
            "CPU ms": round(t.cpu * 1e3, 1),
            "CPU vs plain JAX": round(base.cpu / t.cpu, 2),
            "page faults": t.faults,
            "loss of step 2": round(losses[name][1], 5),
        }
        for name, t in times.items()
    ]
    note = "The allocator keeps freed memory." if arguments.keep_memory else "Stock allocator."
    note += (
        " Torch's threads spin while they wait for each other, so its rows mean something on an "
        "idle machine only: see the load."
    )
    name = "cpu_decoder_kept_memory" if arguments.keep_memory else "cpu_decoder"
    _harness.write(name, "measured", "CPU", rows, note)


if __name__ == "__main__":
    main()
