"""What compiling a step by `compile_step` takes over a hand-written `jax.jit` of the same step.

`python benchmarks/compile_time.py [--turns 4]` compiles in processes of their own, in turn, so that
nothing is traced before: the plain decoder of `_plain_decoder.py` with adamw, by hand and by
`compile_step`, on simulated devices. Writes `benchmarks/results/compile_time.{json,md}`. The aim:
at most 1.1 times the hand-written one.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from _harness import write

# Name: (devices, micro-batches).
CASES = {"data=1": (1, 1), "data=8": (8, 1), "fsdp=8": (8, 1), "data=8, accumulate=2": (8, 2)}
CASES["data=8, accumulate=4"] = (8, 4)  # parts of one row are traced once more
LAYERS, ROWS, LENGTH = 4, 32, 64


def child(case: str, ours: bool, profile: str) -> None:
    """Compiles once and prints seconds: in all, and of processors."""
    import jax

    devices, parts = CASES[case]
    jax.config.update("jax_num_cpu_devices", devices)
    import _plain_decoder as plain
    import jax.numpy as jnp
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit.lm import DecoderConfig

    config = DecoderConfig(vocab=256, embed_dim=64, num_layers=LAYERS, num_heads=4, mlp_dim=192)
    batch = {name: np.ones((ROWS, LENGTH), np.int32) for name in ("inputs", "targets")}
    batch["weights"] = np.ones((ROWS, LENGTH), np.float32)
    optimizer, axis = optax.adamw(1e-3), case.partition("=")[0]
    mesh = sk.MeshSpec(**{axis: devices}).build()
    jax.jit(lambda x: x * 2)(jnp.ones(3))  # the compiler is loaded

    def init(key: jax.Array) -> Any:
        return plain.init(config, key)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean(batch["weights"] * plain.losses(params, batch))

    def compile_ours() -> Any:
        fsdp = sk.Strategy(params=sk.shard_largest("fsdp"), batch=jax.P("fsdp"))
        return sk.compile_step(
            loss_fn,
            optimizer,
            init=init,
            batch=batch,
            mesh=mesh,
            strategy=fsdp if axis == "fsdp" else sk.strategies.data(),
            accumulate=parts,
        ).program.compiled

    def compile_by_hand() -> Any:
        rows, whole = jax.NamedSharding(mesh, jax.P(axis)), jax.NamedSharding(mesh, jax.P())

        def place(x: Any) -> Any:
            sizes = [n if n % devices == 0 else 0 for n in x.shape]
            dim = int(np.argmax(sizes)) if axis == "fsdp" and any(sizes) else None
            spec = jax.P() if dim is None else jax.P(*[None] * dim, axis)
            return jax.NamedSharding(mesh, spec)

        params = jax.eval_shape(init, jax.random.key(0))
        moments = jax.eval_shape(optimizer.init, params)
        placed = jax.tree.map(place, (params, moments))

        def gradients(params: Any, batch: Any) -> Any:
            if parts == 1:
                return jax.value_and_grad(loss_fn)(params, batch, None)
            # One reduction, as by `accumulate`: each device sums over its own rows first.
            split = {k: x.reshape(devices, parts, -1, LENGTH) for k, x in batch.items()}

            def add(sums: Any, part: Any) -> Any:
                new = jax.vmap(jax.value_and_grad(loss_fn), (None, 0, None))(params, part, None)
                return jax.tree.map(jnp.add, sums, new), None

            of_shard = jax.tree.map(lambda x: jnp.zeros((devices, *x.shape), x.dtype), params)
            zeros = jax.lax.with_sharding_constraint((jnp.zeros(devices), of_shard), rows)
            moved = {k: jnp.moveaxis(x, 1, 0) for k, x in split.items()}
            sums, _ = jax.lax.scan(add, zeros, moved)
            return jax.tree.map(lambda x: x.sum(0) / devices / parts, sums)

        def update(state: Any, batch: Any) -> Any:
            params, moments, step = state
            loss, grads = gradients(params, batch)
            updates, moments = optimizer.update(grads, moments, params)
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
            return (optax.apply_updates(params, updates), moments, step + 1), metrics

        state = (params, moments, jax.ShapeDtypeStruct((), jnp.int32))
        at = (*placed, whole)
        jitted = jax.jit(
            update, in_shardings=(at, rows), out_shardings=(at, whole), donate_argnums=0
        )
        return jitted.lower(state, batch).compile()

    call = compile_ours if ours else compile_by_hand
    if profile:
        import cProfile

        cProfile.runctx("call()", {}, {"call": call}, profile)
        return
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(json.dumps({"wall": wall, "used": used}))


def main() -> None:
    """Compiles every case in turn and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--profile", default="")
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1] == "ours", options.profile)
        return
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.turns):
        for case in CASES:
            for who in ("by hand", "ours"):
                command = [sys.executable, __file__, "--child", case, who]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                seen.setdefault((case, who), []).append(found)
    rows = [_row(case, seen[case, "by hand"], seen[case, "ours"]) for case in CASES]
    note = (
        f"The plain decoder, {LAYERS} scanned layers, f32, adamw: shapes of the state, trace, "
        "lower and compile, each time in a new process. Ratios are of two in the same turn; on "
        "a busy machine those of processor time say more."
    )
    write("compile_time", "measured", "1 and 8 simulated CPU devices", rows, note)


def _row(case: str, hand: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"step": case}
    for name, field in (("", "wall"), ("processor ", "used")):
        ratios = [b[field] / a[field] for a, b in zip(hand, ours, strict=True)]
        row[f"jit by hand, {name}s"] = round(statistics.median(x[field] for x in hand), 2)
        row[f"compile_step, {name}s"] = round(statistics.median(x[field] for x in ours), 2)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        row[f"{name}ratio"] = f"{statistics.median(ratios):.2f} ({spread})"
    return row | {"turns": len(hand)}


if __name__ == "__main__":
    main()
