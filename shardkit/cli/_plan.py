"""`shardkit plan`: which mesh for a config's model on a target."""

import argparse
from pathlib import Path

from rich.console import Console

from ..plan import plan
from ..targets import Source
from ._command import Command


def _run(arguments: argparse.Namespace) -> int:
    source = Source(arguments.config or "", tuple(arguments.overrides))
    made = plan(
        source.load(),
        arguments.target,
        global_batch=arguments.global_batch,
        overlap=arguments.overlap,
    )
    if arguments.json:
        Path(arguments.json).write_text(made.to_json())
    Console(highlight=False, soft_wrap=True).print(str(made), markup=False)
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="tpu:v5p:8x8x8, gpu:h100:4x8, …")
    parser.add_argument("--global-batch", type=int, help="rows, instead of the config's")
    parser.add_argument(
        "--overlap", type=float, default=0.0, help="share of communication that is hidden, 0 to 1"
    )
    parser.add_argument("--json", metavar="FILE", help="save all layouts with their figures")


PLAN = Command("plan", "which mesh for this model on these devices", _run, _add_options)
