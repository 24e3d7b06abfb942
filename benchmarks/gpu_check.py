"""Everything that needs a GPU, in one go of at most ten minutes.

`python benchmarks/gpu_check.py` on a machine with a GPU; `--tiny` does the same in small sizes on
one CPU device, to know that it works. It writes `benchmarks/results/gpu_check.{json,md}` after each
part, and goes on with the next part where one fails, so that a run that is ended has its results:

- rate: what one large product reaches, to hold model FLOPs against;
- nano and 1B: an update in bf16, against a hand-written `jax.jit` in turn; MFU against that rate;
  modelled against measured; whether cuDNN computes the attention; whether the loss falls;
- checkpoint: save and restore of the 1B state, against plain writes and reads of as many bytes;
- warm start: compiling a step, and taking it from a folder.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import _harness

LIMIT = 600.0
# Model, rows and length of a batch, updates in one turn.
SIZES: dict[str, tuple[dict[str, int], int, int, int]] = {
    "nano": ({"vocab": 256, "embed_dim": 128, "num_layers": 4, "num_heads": 4}, 64, 256, 10),
    "1B": ({"vocab": 32000, "embed_dim": 2048, "num_layers": 18, "num_heads": 16}, 8, 2048, 1),
}
TINY: dict[str, tuple[dict[str, int], int, int, int]] = {
    "nano": ({"vocab": 256, "embed_dim": 16, "num_layers": 1, "num_heads": 2}, 2, 16, 1),
    "1B": ({"vocab": 256, "embed_dim": 32, "num_layers": 2, "num_heads": 2}, 2, 16, 1),
}
PRODUCT = {False: 8192, True: 128}
Rows = Iterator[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Check:
    """One run of all parts.

    Attributes:
      tiny: small sizes.
      turns: of each contestant.
    """

    tiny: bool
    turns: int

    def spec(self, name: str) -> Any:
        """The step of a model: bf16 products, full remat for the large one, adamw."""
        import optax

        import shardkit as sk
        from shardkit.data import DataConfig
        from shardkit.lm import DecoderConfig, declare_run

        sizes, rows, length, _ = (TINY if self.tiny else SIZES)[name]
        model = DecoderConfig(**sizes, mlp_dim=sizes["embed_dim"] * 11 // 4 // 16 * 16)
        return declare_run(
            model,
            DataConfig(seq_len=length, batch_size=rows),
            sk.strategies.data(),
            optax.adamw(1e-3),
            precision="bfloat16",
            remat="full" if name == "1B" else "none",
        )

    def mesh(self) -> Any:
        """One device."""
        import jax

        import shardkit as sk

        return sk.MeshSpec(data=1).build(devices=jax.devices()[:1])

    @functools.cached_property
    def rate(self) -> float:
        """FLOP/s of one large product in bf16."""
        import jax
        import jax.numpy as jnp

        n = PRODUCT[self.tiny]
        x = jnp.ones((n, n), jnp.bfloat16)
        product = jax.jit(lambda x: x @ x)
        call = functools.partial(_repeat, product, x, 10)
        return 10 * 2 * n**3 / _harness.interleave({"x": call}, self.turns)["x"].median

    def product(self) -> Rows:
        """The rate that everything is held against."""
        n = PRODUCT[self.tiny]
        yield {"what": f"bf16 product of {n} × {n}", "TFLOP/s": round(self.rate / 1e12, 3)}

    def updates(self, name: str) -> Rows:
        """One model's update against a hand-written one."""
        import jax
        import numpy as np

        spec = self.spec(name)
        _, rows, length, calls = (TINY if self.tiny else SIZES)[name]
        step = spec.compile(self.mesh())
        tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length) % 251
        batch = step.shard_batch(
            {"inputs": tokens, "targets": (tokens + 1) % 251, "weights": np.ones_like(tokens, "f")}
        )
        report, hand = step.report(), hand_written(spec, step)
        losses: dict[str, list[float]] = {"step": [], "jit": []}
        # One state at a time: two of 1B parameters with their moments may not fit.
        states: dict[str, Any] = {}

        def run(kind: str, call: Callable[..., Any]) -> None:
            if kind not in states:
                states.clear()
                states[kind] = step.init(jax.random.key(0))
            for _ in range(calls):
                states[kind], metrics = call(states[kind], batch)
            losses[kind].append(float(metrics["loss"]))

        seen = {}
        for kind, call in (("jit", hand), ("step", step)):
            timed = {kind: functools.partial(run, kind, call)}
            seen[kind] = _harness.interleave(timed, self.turns)[kind].median / calls
        flops = report.flops.model if report.flops else 0
        modelled = report.timeline.high if report.timeline else None
        yield {
            "what": f"update of {name}, {_count(spec) / 1e6:.1f} M parameters, bf16",
            "ms": round(seen["step"] * 1e3, 2),
            "hand-written jit (ms)": round(seen["jit"] * 1e3, 2),
            "ratio": round(seen["step"] / seen["jit"], 3),
            "TFLOP/s": round(flops / seen["step"] / 1e12, 3),
            "MFU against the product": round(flops / seen["step"] / self.rate, 3),
            "modelled (ms)": round(modelled * 1e3, 2) if modelled else "",
            "cuDNN attention": "cudnn" in step.hlo().lower(),
            "loss falls": losses["step"][-1] < losses["step"][0],
            "equal to jit": bool(np.allclose(losses["step"], losses["jit"], rtol=2e-2)),
        }

    def checkpoint(self) -> Rows:
        """Saving and restoring the state, against plain files of the same size."""
        import jax

        import shardkit as sk

        step = self.spec("1B").compile(self.mesh())
        state = step.init(jax.random.key(0))
        size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        with tempfile.TemporaryDirectory() as folder:
            with sk.Checkpointer(pathlib.Path(folder, "steps")) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(1, state)
                blocked = time.perf_counter() - began
                checkpoints.wait()
                saved = time.perf_counter() - began
                began = time.perf_counter()
                found = checkpoints.restore(step.abstract_state, step.shardings)
                jax.block_until_ready(found.state)
                restored = time.perf_counter() - began
            written, read = _plain_io(pathlib.Path(folder, "plain"), size)
        yield {
            "what": f"checkpoint of {size / 1e9:.3f} GB",
            "save (s)": round(saved, 3),
            "of it blocking (s)": round(blocked, 3),
            "plain write (s)": round(written, 3),
            "restore (s)": round(restored, 3),
            "plain read (s)": round(read, 3),
        }

    def warm_start(self) -> Rows:
        """Compiling the step of the large model, and taking it from a folder."""
        with tempfile.TemporaryDirectory() as folder:
            seconds, kept = [], []
            for _ in range(2):
                began = time.perf_counter()
                step = self.spec("1B").compile(self.mesh(), cache=folder)
                seconds.append(time.perf_counter() - began)
                kept.append(step.program.from_cache)
        assert kept == [False, True], "the second start should have compiled nothing"
        cold, warm = (round(x, 2) for x in seconds)
        yield {"what": "start of the 1B step", "compiled (s)": cold, "from a folder (s)": warm}


def hand_written(spec: Any, step: Any) -> Callable[..., Any]:
    """The same update as a plain `jax.jit`: same loss, products in bf16, adamw, donation."""
    import jax
    import jax.numpy as jnp
    import optax

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def value(params: Any, batch: Any, key: Any) -> Any:
        found = spec.loss_fn(cast(params), batch, key)
        mean = found[0] if isinstance(found, tuple) else found
        return (mean.total / mean.weight).astype(jnp.float32)

    if spec.remat == "full":
        value = jax.checkpoint(value)

    def update(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(value)(state.params, batch, state.key)
        updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        after = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        return after, metrics

    whole = jax.NamedSharding(step.mesh, jax.P())
    shardings = (step.shardings, step.batch_shardings)
    return jax.jit(
        update, in_shardings=shardings, out_shardings=(step.shardings, whole), donate_argnums=0
    )


def _repeat(call: Callable[..., Any], x: Any, times: int) -> None:
    import jax

    for _ in range(times):
        y = call(x)
    jax.block_until_ready(y)


def _count(spec: Any) -> int:
    import jax

    shapes = jax.eval_shape(spec.init, jax.eval_shape(lambda: jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(shapes))


def _plain_io(path: pathlib.Path, size: int) -> tuple[float, float]:
    """Seconds to write and sync a file, and to read it with a cold page cache."""
    block = os.urandom(min(size, 2**24))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    written = time.perf_counter() - began
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while file.read(2**24):
            pass
    return written, time.perf_counter() - began


def run_parts(check: Check, save: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Runs every part that there is time for, and saves after each."""
    parts: dict[str, Callable[[], Rows]] = {
        "rate": check.product,
        "nano": functools.partial(check.updates, "nano"),
        "1B": functools.partial(check.updates, "1B"),
        "warm start": check.warm_start,
        "checkpoint": check.checkpoint,
    }
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for name, part in parts.items():
        if time.perf_counter() - began > 0.7 * LIMIT:
            rows.append({"what": name, "problem": "left out: the time is up"})
            continue
        try:
            rows += part()
        except Exception as error:  # the other parts are worth having
            first = str(error).strip().splitlines()[:1]
            rows.append({"what": name, "problem": f"{type(error).__name__}: {' '.join(first)}"})
        save(rows)
    return rows


def main() -> None:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    import jax

    device = jax.devices()[0]
    note = "Medians of turns, each blocking; model FLOPs without recomputation."
    name = "gpu_check_tiny" if options.tiny else "gpu_check"
    if device.platform != "gpu" and not options.tiny:
        raise SystemExit(f"needs a GPU; this is {device.device_kind}. --tiny runs anywhere")
    save = functools.partial(_harness.write, name, "measured", device.device_kind, note=note)
    run_parts(Check(options.tiny, options.turns), lambda rows: save(rows=rows))


if __name__ == "__main__":
    main()
