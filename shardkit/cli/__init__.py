"""The command line: `shardkit COMMAND [CONFIG] [--set path.to.field=value]`."""

from ._main import main

__all__ = ["main"]
