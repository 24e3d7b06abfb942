"""The parity table, run row by row on eight simulated devices: writes docs/parity.md.

python benchmarks/parity.py [NAME …]

With names, only these rows run; the others are kept as they are.
"""

import os
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
HEAD = """# Parity: every strategy against one device and the textbook

Eight simulated CPU devices, jax {jax}. The model is the reference decoder with dropout, two layers,
and 16 rows of 8 tokens; half of the rows have no valid token. Each row passed all checks: layout of
every leaf, first state bit for bit, loss, gradient norm, every gradient leaf, parameters after one
and two clipped SGD updates, and one compilation.

- *Error* is the relative error of the worst gradient leaf; *noise* is how much that leaf changes if
  every parameter is nudged by one rounding.
- *Ratio* is compiled wire bytes over the textbook minimum, as a mean over devices where they send
  different amounts, as the stages of a pipeline do. The minimum of a tensor axis counts only
  layers, so rows marked deep have 16 of them.
- `shard_map` rows are compiled in that mode. With `accumulate` they keep the weights that they
  gathered, and send less than the minimum. f32 rows with one reduction per step are at most 1.05.
  Two other rows are above: *tied each* reduces each micro-batch, as declared, and the CPU backend
  sends *all bf16* as f32.

`sk.verify` makes the same comparison of any step, in three steps of its declared optimizer: the
counters of the state, metrics and gradient norms of every step, and evaluations before and after
them. Its random integers cover all that they look up; without `meshes` it takes all devices, 6
and 3 of them. In bf16 the error of a leaf cannot tell a gradient from one a tenth larger, so its
projection on one device's must be within 8 % too (between right meshes: 6e-3). Beside the step
each mesh compiles three programs. A failure names the likely kind of fault, such as `the loss
mixes rows: …` with its line. `shardkit.testing.MUTATIONS`, and `RARE_MUTATIONS` for what shows on
some steps only, are bugs that it must find.

`benchmarks/parity.py` writes this page from `tests/_parity.py`, where a new row is one line.

"""
COLUMNS = ("row", "mesh", "micro-batches", "precision", "remat", "worst leaf", "error", "noise")


def line(name: str) -> str:
    """One row of the page; raises if the row fails."""
    import _parity

    case = _parity.CASES[name]
    report = _parity.parity_report(name).check()
    worst = next(row for row in report.rows if row.check == "gradients")
    ratios = _parity.ratios(name)
    mesh = " × ".join(f"{axis}={size}" for axis, size in case.mesh.items())
    sent = ", ".join(f"{axis} {ratio:.2f}" for axis, ratio in ratios.items())
    title = f"{name} (deep)" if case.model == _parity.DEEP else name
    accumulate = case.accumulate
    micro = (
        accumulate
        if isinstance(accumulate, int)
        else f"{accumulate.micro_batches}, reduced in each"
    )
    cells = [title, mesh, str(micro), case.precision, case.remat, worst.leaf]
    cells += [f"{worst.error:.1e}", f"{worst.noise:.1e}", sent]
    cells.append(case.why if any(ratio > 1.1 for ratio in ratios.values()) else "")
    print(cells, flush=True)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs rows and writes the page."""
    # As the tests do: programs of milliseconds need no optimization by LLVM.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, str(ROOT / "tests"))
    import _parity

    page, names = ROOT / "docs" / "parity.md", sys.argv[1:]
    old = [text for text in page.read_text().splitlines() if text.startswith("|")]
    kept = {text.split("|")[1].strip().removesuffix(" (deep)"): text for text in old}
    columns = (*COLUMNS, "ratio", "reason: the program, or XLA's CPU compiler, …")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [kept[n] if names and n not in names else line(n) for n in _parity.CASES]
    page.write_text(HEAD.format(jax=jax.__version__) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
