"""How long it takes until shardkit does something: imports, help, an empty test.

`python benchmarks/startup.py` starts processes in turn, A B C A B C …, and writes
`benchmarks/results/startup.{json,md}`. The claims: help, the version and usage errors in less than
half a second; `import shardkit` within 1.1 times its dependencies; the pytest plugin costs nothing.
"""

import argparse
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from _harness import interleave, write

ROOT = pathlib.Path(__file__).parent.parent
NOTHING, DEPENDENCIES = "python -c pass", "import jax, optax, flax.nnx"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
WITH, WITHOUT = "empty test, with the plugin", "empty test, without"
CONTESTANTS = {
    NOTHING: ["-c", "pass"],
    "import shardkit": ["-c", "import shardkit"],
    "shardkit --help": ["-m", "shardkit", "--help"],
    "shardkit --version": ["-m", "shardkit", "--version"],
    "shardkit train --help": ["-m", "shardkit", "train", "--help"],
    "shardkit trian": ["-m", "shardkit", "trian"],
    DEPENDENCIES: ["-c", DEPENDENCIES],
    "import shardkit, every name": ["-c", "from shardkit import *"],
    WITHOUT: [*PYTEST, "-p", "no:shardkit"],
    WITH: [*PYTEST, "-p", "shardkit.testing._plugin"],
}
# What each is held against, other than the interpreter that does nothing.
AGAINST = {"import shardkit, every name": DEPENDENCIES, WITH: WITHOUT}


def start(words: list[str], folder: str) -> None:
    """Runs a process to its end, with this checkout in the place of any other."""
    # The plugin is loaded by name: which shardkit is installed makes no difference.
    alone = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, **alone}, capture_output=True
    )


def main() -> None:
    """Times all of them and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "test_it.py").write_text("def test(): pass\n")
        calls = {name: functools.partial(start, w, folder) for name, w in CONTESTANTS.items()}
        seen = interleave(calls, options.turns)
    rows = []
    for name, timing in seen.items():
        other = AGAINST.get(name, NOTHING)
        pairs = zip(timing.walls, seen[other].walls, strict=True)
        ratio = statistics.median(own / theirs for own, theirs in pairs)
        rows.append(
            {
                "what": name,
                "median (s)": round(timing.median, 3),
                "fastest quarter (s)": round(timing.low, 3),
                "against": other,
                "median of paired ratios": round(ratio, 2),
                "difference of medians (s)": round(timing.median - seen[other].median, 3),
                "turns": options.turns,
            }
        )
    note = "Whole processes, from start to exit, in turn. Each ratio is of two in the same turn."
    write("startup", "measured", "no devices", rows, note)


if __name__ == "__main__":
    main()
