"""Seconds from the end of one of two processes to that of the other.

    python benchmarks/processes.py [--repetitions 10]

Two processes with four simulated devices each make updates of one array with a mean over all of
them, a collective of every step. At step 20 process 1 is killed, raises, or sleeps for ever, and
notes the time; the launcher returns when both have ended.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import _harness

TIMEOUT = 2.0
BREAKS = {
    "killed": "os.kill(os.getpid(), 9)",
    "raises": "raise ValueError('boom')",
    "stuck": "time.sleep(600)",
}
PROGRAM = """
import os, sys, time, pathlib
import jax, numpy as np
import shardkit as sk
with sk.distributed(step_timeout={timeout}) as peers:
    split = jax.NamedSharding(sk.MeshSpec(data=8).build(), jax.P("data"))
    step = jax.jit(lambda x: x + x.mean(), out_shardings=split)
    x = jax.make_array_from_callback((8,), split, lambda index: np.arange(8.0)[index])
    for i in range(1000):
        if i == 20 and peers.index == 1:
            pathlib.Path(sys.argv[1]).write_text(str(time.time()))
            {how}
        x = step(x)
        peers.began(i + 1)
        x.block_until_ready()
"""


def once(how: str) -> tuple[float, int, str]:
    """Breaks one run; returns seconds until all had ended, the code, and the first line."""
    with tempfile.TemporaryDirectory() as folder:
        note = pathlib.Path(folder) / "broken"
        program = PROGRAM.format(how=BREAKS[how], timeout=TIMEOUT)
        words = ["-m", "shardkit.cli", "launch", "-n", "2", "--devices", "4", "--"]
        run = subprocess.run(
            [sys.executable, *words, sys.executable, "-c", program, str(note)],
            capture_output=True,
            text=True,
        )
        ended = time.time()
        return ended - float(note.read_text()), run.returncode, run.stderr.partition("\n")[0]


def main() -> None:
    """Breaks runs in turns, so that a busy moment of the machine hits every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, int, str]]] = {how: [] for how in BREAKS}
    for _ in range(arguments.repetitions):
        for how in BREAKS:
            found[how].append(once(how))
            assert re.match(r"process 1 of 2, step \d+: ", found[how][-1][2]), found[how][-1]
    rows = []
    for how, all_of_them in found.items():
        seconds = sorted(one[0] for one in all_of_them)
        row = {"process 1": how, "runs": len(seconds)}
        row |= {
            "median s": f"{seconds[len(seconds) // 2]:.2f}",
            "least s": f"{seconds[0]:.2f}",
            "most s": f"{seconds[-1]:.2f}",
        }
        codes = ", ".join(str(code) for code in sorted({one[1] for one in all_of_them}))
        rows.append({**row, "code": codes, "first line": all_of_them[-1][2]})
    text = (
        "Seconds from what happened to process 1 until the launcher has seen both processes end "
        f"and has returned; of the stuck one {TIMEOUT:g} s are the declared step timeout."
    )
    _harness.write("processes", "measured", "2 x 4 simulated CPU devices", rows, text)


if __name__ == "__main__":
    main()
