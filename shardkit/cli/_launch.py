"""`shardkit launch`."""

import argparse

from ..processes import launch
from ._command import Command


def _run(arguments: argparse.Namespace) -> int:
    words = arguments.words
    words = words[1:] if words[:1] == ["--"] else words
    return launch(words, arguments.processes, arguments.devices)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", type=int, required=True, metavar="N", dest="processes", help="number of processes"
    )
    parser.add_argument(
        "--devices", type=int, metavar="D", help="CPU devices that each process simulates"
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="what each process runs: -- shardkit train CONFIG --set ...",
    )


LAUNCH = Command(
    "launch",
    "run a command in several processes of this machine, for tests",
    _run,
    _add_options,
    takes_config=False,
)
