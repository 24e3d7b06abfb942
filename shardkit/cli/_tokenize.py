"""`shardkit tokenize PATH OUT`: text into token shards."""

import argparse

from .._core.io._console import make_console
from .._core.tree import format_bytes
from ..data import open_shards, tokenize


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    with console.status("tokenizing"):
        made = tokenize(arguments.path, arguments.out, arguments.tokenizer, arguments.tokens)
    stream = open_shards(made)
    size = format_bytes(sum(path.stat().st_size for path in made))
    console.print(
        f"{arguments.out}: {stream.size:,} tokens in {len(stream.ends):,} documents, "
        f"{len(made)} shards, {size}; vocabulary {stream.vocabulary}"
    )
    words = [f"data.path={arguments.out}"]
    if arguments.tokenizer:
        words += [f"data.tokenizer={arguments.tokenizer}", f"model.vocab={stream.vocabulary}"]
    console.print("shardkit train", *(f"--set {word}" for word in words))
    return 0
