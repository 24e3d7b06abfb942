"""Compiling for devices that are not here, in a child process of its own."""

from ._child import NotCompiled, OwnFailure, compile_for
from ._devices import build
from ._source import Source

__all__ = [
    "NotCompiled",
    "OwnFailure",
    "Source",
    "build",
    "compile_for",
]
