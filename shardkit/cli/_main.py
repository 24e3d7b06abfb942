"""Reads the command line, runs one command, and turns what went wrong into one screen."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from .._core.errors import ShardkitError, Stopped
from .._core.startup import quiet_libtpu
from ._command import add_shared
from ._commands import COMMANDS

# 75 is sysexits' EX_TEMPFAIL: nothing is wrong, try again later.
_FAILED, _REFUSED, _STOPPED, _INTERRUPTED = 1, 2, 75, 130


def parser() -> argparse.ArgumentParser:
    """Builds the parser with one sub-command for each of `COMMANDS`."""
    root = argparse.ArgumentParser(
        prog="shardkit",
        description="Declare a mesh and specs; compile, prove and run one SPMD training step.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    below = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = below.add_parser(command.name, help=command.help, allow_abbrev=False)
        add_shared(sub, command.takes_config)
        command.add_options(sub)
        sub.set_defaults(run=command.run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the words behind `shardkit`; those of the process by default.

    Returns:
      0; 1 for a failure that is no user's fault; 2 where the user's declaration, config or data
      cannot be used; 75 where SIGTERM ended a run that can go on; 130 after Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    if argv is None:  # the process is ours: what it sets is nobody else's
        os.environ.update(quiet_libtpu(os.environ))
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt as stop:
        _say("yellow", "Interrupted.", stop)
        return _INTERRUPTED
    except Stopped as stop:
        _say("yellow", str(stop), stop)
        return _STOPPED
    except ShardkitError as error:
        _trace(arguments.debug)
        _say("red", f"{type(error).__name__}: {error}", error)
        return _REFUSED
    except Exception as error:
        _trace(arguments.debug)
        _say("red", f"shardkit has failed: {type(error).__name__}: {error}", error)
        if not arguments.debug:
            _say("", "Add --debug for the traceback; please report it.")
        return _FAILED


def _say(color: str, message: str, error: BaseException | None = None) -> None:
    from .._core.io._console import make_console

    notes = getattr(error, "__notes__", [])
    console = make_console(stderr=True, soft_wrap=True)
    console.print("\n".join([message, *notes]), style=color)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that alone takes as long as the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints it and ends."""
        import importlib.metadata

        try:
            print(f"shardkit {importlib.metadata.version('shardkit')}")
        except importlib.metadata.PackageNotFoundError:
            print("shardkit (from a checkout)")
        parser.exit()
