"""`Command`: a word after `shardkit` with its options, as data; it imports nothing but argparse."""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import operator
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from .._core.interrupts import active_guard

Run = Callable[[argparse.Namespace], int]

option: Callable[..., Callable[[argparse.ArgumentParser], Any]]
option = functools.partial(operator.methodcaller, "add_argument")
"""An option, from the arguments of `add_argument`; called with a parser it adds itself."""


def flag(name: str, help: str) -> Callable[[argparse.ArgumentParser], Any]:
    """An option without a value."""
    return option(name, action="store_true", help=help)


def value(
    name: str, metavar: str, help: str, **more: Any
) -> Callable[[argparse.ArgumentParser], Any]:
    """An argument, or an option with a value."""
    return option(name, metavar=metavar, help=help, **more)


def field_option(name: str, field: str, metavar: str) -> Callable[[argparse.ArgumentParser], Any]:
    """A short form of `--set field=VALUE`."""
    return option(
        name,
        action="append",
        dest="overrides",
        type=f"{field}={{}}".format,
        metavar=metavar,
        help=f"short for --set {field}={metavar}",
    )


CONFIG = (
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
    """A subcommand."""

    name: str  # the word after `shardkit`
    help: str  # one line
    run: Run  # runs the command; returns the exit code
    # its own, besides `CONFIG`, `--set` and `--debug`
    options: tuple[Callable[[argparse.ArgumentParser], Any], ...] = ()
    takes_config: bool = True  # whether it has `CONFIG` and `--set`
    examples: tuple[str, ...] = ()  # command lines for its help

    def add_to(self, commands: Any) -> None:
        """Adds the command to the subparsers of a parser."""
        lines = [f"  {line}" for line in self.examples]
        width = shutil.get_terminal_size().columns - 2
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=textwrap.fill(f"{self.help[0].upper()}{self.help[1:]}.", width),
            epilog="\n".join(["examples:", *lines]) if lines else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_options(parser)
        parser.set_defaults(run=self.run, parser=parser)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds all of its options to a parser, the shared ones first."""
        for add in (*(CONFIG if self.takes_config else ()), _DEBUG, *self.options):
            add(parser)


def import_late(module: str, name: str = "run") -> Run:
    """Returns a function of a module of this package; calling it imports the module."""

    def run(arguments: argparse.Namespace) -> int:
        guard = active_guard()
        with guard.importing() if guard else contextlib.nullcontext():
            imported = importlib.import_module(module, __package__)
        return getattr(imported, name)(arguments)

    return run
