"""`shardkit hardware`: the table of chips, each figure with its source."""

import argparse

from ..config import load_config
from ..hardware import find_chip, hardware_table, known_chips, measure_cpu


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    more = load_config(arguments.config).hardware if arguments.config else ()
    names = arguments.names or list(known_chips(more))
    chips = [find_chip(name, more) for name in names]
    if arguments.measure:
        chips.append(measure_cpu())
    print(hardware_table(chips))
    return 0
