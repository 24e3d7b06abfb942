"""`shardkit launch`."""

import argparse

from ..processes import launch


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    words = arguments.words
    words = words[1:] if words[:1] == ["--"] else words
    return launch(words, arguments.processes, arguments.devices)
