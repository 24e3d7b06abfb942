"""`Command`: a word after `shardkit` with its options, as data; it imports nothing but argparse."""

import argparse
import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], int]

option: Callable[..., Callable[[argparse.ArgumentParser], Any]]
option = functools.partial(operator.methodcaller, "add_argument")
"""An option, from the arguments of `add_argument`; called with a parser it adds itself."""

_CONFIG = (
    option(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="Python file with def config() -> sk.Config, or the name of a shipped one: nano",
    ),
    option(
        "--set",
        action="append",
        default=[],
        metavar="PATH.TO.FIELD=VALUE",
        dest="overrides",
        help="change one field, e.g. --set model.num_layers=2 --set mesh.tensor=2; may be repeated",
    ),
)
_DEBUG = option("--debug", action="store_true", help="show the traceback of an error")


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      name: the word after `shardkit`.
      help: one line.
      run: runs the command; returns the exit code.
      options: its own, besides `CONFIG`, `--set` and `--debug`.
      takes_config: whether it has `CONFIG` and `--set`.
    """

    name: str
    help: str
    run: Run
    options: tuple[Callable[[argparse.ArgumentParser], Any], ...] = ()
    takes_config: bool = True

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds all of its options to a parser, the shared ones first."""
        for add in (*(_CONFIG if self.takes_config else ()), _DEBUG, *self.options):
            add(parser)


def import_late(module: str, name: str = "run") -> Run:
    """Returns a function of a module of this package; calling it imports the module."""

    def run(arguments: argparse.Namespace) -> int:
        return getattr(importlib.import_module(module, __package__), name)(arguments)

    return run
