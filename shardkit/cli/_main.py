"""Parses the command line, runs one command, and prints its error."""

import argparse
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .._core.errors import SavedStepWarning, ShardkitError, Stopped, did_you_mean
from .._core.interrupts import INTERRUPTED, InterruptGuard, exit_now
from .._core.io._table import narrow_texts
from .._core.startup import quiet_libtpu
from ._commands import COMMANDS

# 75 is EX_TEMPFAIL of sysexits.h: run the same command again.
_FAILED, _REFUSED, _STOPPED, _INTERRUPTED = 1, 2, 75, INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Its errors name the closest command, option or value that there is."""

    def __init__(self, **options: Any) -> None:
        self.known: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds an argument whose names and choices are known."""
        action = super().add_argument(*names, **options)
        self.known += [*action.option_strings, *map(str, action.choices or ())]
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses; what no parser knows is told by the command's, whose usage is shown."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            found.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and exits with 2."""
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s'=]+)", message)
        near = did_you_mean(wrong[1], self.known) if wrong else ""
        super().error(f"{message}.{near}" if near else message)


def parser() -> argparse.ArgumentParser:
    """Builds the parser, with a subcommand for each of `COMMANDS`."""
    root = _Parser(
        prog="shardkit",
        description="Declare a mesh and specs; compile, prove and run one SPMD training step.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    below = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(below)
        root.known.append(command.name)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the words after `shardkit`; by default those of the process.

    Returns:
      0 for success; 1 for an internal error; 2 for a declaration, config or data that cannot be
      used; 75 if SIGTERM stopped a run that can be resumed; 130 after Ctrl-C.
    """
    if argv is not None:
        return _run(argv, InterruptGuard())
    # The process runs only this command, so its environment, handlers and end may change.
    with InterruptGuard() as guard:
        try:
            code = _run(None, guard)
        except KeyboardInterrupt:  # again, while the first was reported
            code = _INTERRUPTED
        if code == _INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            exit_now(code)
    return code


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Messages of shardkit are whole: the line of its code that warns says nothing to a user."""
    told_by = "" if category is SavedStepWarning else f"{filename}:{lineno}: "
    return f"{told_by}{category.__name__}: {message}\n"


def _run(argv: Sequence[str] | None, guard: InterruptGuard) -> int:
    with guard.importing():
        arguments = parser().parse_args(argv)
    if argv is None:
        os.environ.update(quiet_libtpu(os.environ))
        warnings.formatwarning = _format_warning
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    try:
        with narrow_texts(columns):
            return arguments.run(arguments)
    except KeyboardInterrupt as stop:
        _print_error("yellow", "Interrupted.", stop)
        return _INTERRUPTED
    except Stopped as stop:
        _print_error("yellow", str(stop), stop)
        return _STOPPED
    except ShardkitError as error:
        _print_traceback(arguments.debug)
        _print_error("red", f"{type(error).__name__}: {error}", error)
        return _REFUSED
    except Exception as error:
        _print_traceback(arguments.debug)
        if guard.interrupted:  # modules that are being imported raise something else for it
            _print_error("yellow", "Interrupted.")
            return _INTERRUPTED
        _print_error("red", f"shardkit has failed: {type(error).__name__}: {error}", error)
        if not arguments.debug:
            _print_error("", "Add --debug for the traceback; please report it.")
        return _FAILED


def _print_error(color: str, message: str, error: BaseException | None = None) -> None:
    from .._core.io._console import make_console

    notes = getattr(error, "__notes__", [])
    console = make_console(stderr=True, soft_wrap=True)
    console.print("\n".join([message, *notes]), style=color)


def _print_traceback(debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)


class _Version(argparse.Action):
    """Looks up the version only for `--version`: that takes as long as building the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints the version and exits."""
        import importlib.metadata

        try:
            print(f"shardkit {importlib.metadata.version('shardkit')}")
        except importlib.metadata.PackageNotFoundError:
            print("shardkit (from a checkout)")
        parser.exit()
