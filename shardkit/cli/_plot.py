"""`shardkit plot`."""

import argparse
from pathlib import Path

from .._errors import count
from ..run import plot_runs
from ._command import Command


def _run(arguments: argparse.Namespace) -> int:
    for note in plot_runs([Path(run) for run in arguments.runs], Path(arguments.out)):
        print(note)
    print(f"{arguments.out}: {count(len(arguments.runs), 'run')}")
    return 0


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: runs/default")
    parser.add_argument(
        "--out",
        default="plot.png",
        metavar="FILE",
        help="picture to write: .png, .svg or .html; plot.png by default",
    )


PLOT = Command("plot", "draw loss and speed of runs", _run, _options, takes_config=False)
