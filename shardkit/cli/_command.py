"""`Command`: a word after `shardkit`; and the options that commands share."""

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      name: the word after `shardkit`.
      help: one line.
      run: runs the command; returns the exit code.
      add_options: adds its own options, besides `CONFIG`, `--set` and `--debug`.
      takes_config: whether it has `CONFIG` and `--set`.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_config: bool = True


def add_shared_options(parser: argparse.ArgumentParser, takes_config: bool = True) -> None:
    """Adds `--debug`, and for commands about a config `CONFIG` and `--set`."""
    if takes_config:
        parser.add_argument(
            "config",
            nargs="?",
            metavar="CONFIG",
            help="Python file with def config() -> sk.Config, or the name of a shipped one: nano",
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
