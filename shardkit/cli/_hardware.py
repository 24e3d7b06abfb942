"""`shardkit hardware`: the table of chips, each figure with its source."""

import argparse

from ..config import load_config
from ..hardware import find_chip, hardware_table, known_chips, measure_cpu
from ._command import Command


def _run(arguments: argparse.Namespace) -> int:
    more = load_config(arguments.config).hardware if arguments.config else ()
    names = arguments.names or list(known_chips(more))
    chips = [find_chip(name, more) for name in names]
    if arguments.measure:
        chips.append(measure_cpu())
    print(hardware_table(chips))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="CHIP", help="v5p, h100, …; all by default")
    parser.add_argument("--config", metavar="CONFIG", help="also the chips of this config file")
    parser.add_argument(
        "--measure", action="store_true", help="also measure this machine's CPU, two seconds"
    )


HARDWARE = Command(
    "hardware",
    "the chips that are known, with the source of each figure",
    _run,
    _add_options,
    takes_config=False,
)
