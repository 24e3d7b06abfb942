"""`shardkit plot`."""

import argparse
from pathlib import Path

from .._core.errors import count
from ..run import plot_runs


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    for note in plot_runs([Path(run) for run in arguments.runs], Path(arguments.out)):
        print(note)
    print(f"{arguments.out}: {count(len(arguments.runs), 'run')}")
    return 0
