"""What a command is, and the arguments that all of them share."""

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """One word behind `shardkit`.

    Attributes:
      name: the word.
      help: one line.
      run: does it; returns the exit code.
      add_options: adds options of its own, beside `CONFIG`, `--set` and `--debug`.
      takes_config: whether it has `CONFIG` and `--set` at all.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_config: bool = True


def add_shared(parser: argparse.ArgumentParser, takes_config: bool = True) -> None:
    """Adds what every command takes, and what every command about a config takes."""
    if takes_config:
        parser.add_argument(
            "config", nargs="?", metavar="CONFIG", help="Python file with def config() -> sk.Config"
        )
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="PATH.TO.FIELD=VALUE",
            dest="overrides",
            help="change one field, e.g. --set model.num_layers=2 --set mesh.tensor=2; "
            "may be repeated",
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
