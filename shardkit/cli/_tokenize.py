"""`shardkit tokenize PATH OUT`: text into token shards."""

import argparse

from .._core.io import make_console
from .._tree import format_bytes
from ..data import open_shards, tokenize
from ._command import Command


def _run(arguments: argparse.Namespace) -> int:
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


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder or a file of text")
    parser.add_argument("out", metavar="OUT", help="folder for the shards, new or empty")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="JSON file of the tokenizers library; bytes without"
    )
    parser.add_argument(
        "--tokens", type=int, default=2**28, metavar="N", help="tokens of one shard (2^28)"
    )


TOKENIZE = Command(
    "tokenize", "turn text into token shards, once", _run, _add_options, takes_config=False
)
