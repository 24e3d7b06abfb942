"""Seconds from the end of one of two processes to that of the other.

    python benchmarks/processes.py [--repetitions 10]

Two processes with four simulated devices each make updates of one array with a mean over all of
them, a collective of every step. At step 20 process 1 is killed, raises, or sleeps for ever, and
notes the time; or both say before the first step what they run, and do not agree. The launcher
returns when both have ended.
"""

import argparse
import dataclasses
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
    "disagrees": "",
}
PROGRAM = """
import os, sys, time, pathlib
import jax, numpy as np
import shardkit as sk
note = lambda: pathlib.Path(f"{{sys.argv[1]}}-{{process_group.index}}").write_text(str(time.time()))
with sk.distributed(step_timeout={timeout}) as process_group:
    if {way!r} == "disagrees":
        note()
        try:
            process_group.agree("step", lr=0.1, seed=process_group.index)
        finally:
            pathlib.Path(f"{{sys.argv[1]}}-stopped-{{process_group.index}}").write_text(str(time.time()))
    split = jax.NamedSharding(sk.MeshSpec(data=8).build(), jax.P("data"))
    step = jax.jit(lambda x: x + x.mean(), out_shardings=split)
    x = jax.make_array_from_callback((8,), split, lambda index: np.arange(8.0)[index])
    for i in range(1000):
        if i == 20 and process_group.index == 1:
            note()
            {how}
        x = step(x)
        process_group.report_step(i + 1)
        x.block_until_ready()
"""


@dataclasses.dataclass(frozen=True)
class Broken:
    """How a run ended.

    Attributes:
      ended: seconds until the launcher had seen the end of all.
      stopped: seconds until both processes had the error; None where one is not to have any.
      code: of the launcher.
      line: the first line of the errors.
    """

    ended: float
    stopped: float | None
    code: int
    line: str


def once(how: str) -> Broken:
    """Breaks one run."""
    with tempfile.TemporaryDirectory() as folder:
        note = pathlib.Path(folder) / "noted"
        program = PROGRAM.format(way=how, how=BREAKS[how], timeout=TIMEOUT)
        words = ["-m", "shardkit", "launch", "-n", "2", "--devices", "4", "--"]
        run = subprocess.run(
            [sys.executable, *words, sys.executable, "-c", program, str(note)],
            capture_output=True,
            text=True,
        )
        ended = time.time()
        times = {path.name: float(path.read_text()) for path in pathlib.Path(folder).iterdir()}
    began = max(at for name, at in times.items() if "stopped" not in name)
    stopped = max((at - began for name, at in times.items() if "stopped" in name), default=None)
    return Broken(ended - began, stopped, run.returncode, run.stderr.partition("\n")[0])


def main() -> None:
    """Breaks runs in turns, so that a busy moment of the machine hits every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    found: dict[str, list[Broken]] = {how: [] for how in BREAKS}
    for _ in range(arguments.repetitions):
        for how in BREAKS:
            found[how].append(once(how))
            where = "before its first step" if how == "disagrees" else r"step \d+"
            assert re.match(rf"process \d of 2, {where}: ", found[how][-1].line), found[how][-1]
    rows = []
    for how, all_of_them in found.items():
        seconds = sorted(one.ended for one in all_of_them)
        row = {"process 1": how, "runs": len(seconds)}
        row |= {
            "median s": f"{seconds[len(seconds) // 2]:.2f}",
            "least s": f"{seconds[0]:.2f}",
            "most s": f"{seconds[-1]:.2f}",
        }
        codes = ", ".join(str(code) for code in sorted({one.code for one in all_of_them}))
        rows.append({**row, "code": codes, "first line": all_of_them[-1].line})
        stopped = sorted(one.stopped for one in all_of_them if one.stopped is not None)
        if stopped:
            rows[-1]["both stopped, median s"] = f"{stopped[len(stopped) // 2]:.2f}"
    text = (
        "Seconds from what happened to process 1 until the launcher has seen both processes end "
        f"and has returned; of the stuck one {TIMEOUT:g} s are the declared step timeout. "
        "Those that disagree count from the later of the two that told what they run, and `both "
        "stopped` is until each of them had the error."
    )
    _harness.write("processes", "measured", "2 x 4 simulated CPU devices", rows, text)


if __name__ == "__main__":
    main()
