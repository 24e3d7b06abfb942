"""Commands of a few lines each; every one imports only what it uses."""

import argparse
from pathlib import Path


def run_hardware(arguments: argparse.Namespace) -> int:
    """Prints the table of chips, each figure with its source."""
    from ..config import load_config
    from ..hardware import find_chip, hardware_table, known_chips, measure_cpu

    own_chips = load_config(arguments.config).hardware if arguments.config else ()
    names = arguments.names or list(known_chips(own_chips))
    chips = [find_chip(name, own_chips) for name in names]
    if arguments.measure:
        chips.append(measure_cpu())
    print(hardware_table(chips))
    return 0


def run_launch(arguments: argparse.Namespace) -> int:
    """Runs a command in several processes; returns the exit code of all of them."""
    from ..processes import launch

    words = arguments.words
    words = words[1:] if words[:1] == ["--"] else words
    return launch(words, arguments.processes, arguments.devices)


def run_plot(arguments: argparse.Namespace) -> int:
    """Plots loss and speed of runs into one file."""
    from .._core.errors import count
    from ..run import plot_runs

    for note in plot_runs([Path(run) for run in arguments.runs], Path(arguments.out)):
        print(note)
    print(f"{arguments.out}: {count(len(arguments.runs), 'run')}")
    return 0


def run_shards(arguments: argparse.Namespace) -> int:
    """Compares every byte of token shards with its checksum."""
    from .._core.errors import DataError, Problem, count, raise_all
    from .._core.tree import format_bytes
    from ..data import verify_shards
    from ..data._read_text import list_shards

    found = {root: list_shards(root) for root in arguments.paths}
    why, fix = "holds no token shards", "shardkit tokenize TEXT FOLDER makes some"
    empty = [Problem(root, why, fix) for root, shards in found.items() if not shards]
    raise_all(DataError, "There is nothing to verify.", empty)
    paths = [path for shards in found.values() for path in shards]
    verify_shards(paths)
    size = format_bytes(sum(path.stat().st_size for path in paths))
    print(f"{count(len(paths), 'token shard')}: intact ({size})")
    return 0


def run_tokenize(arguments: argparse.Namespace) -> int:
    """Encodes text as token shards, and prints how to train on them."""
    from .._core.io._console import make_console, show_task
    from .._core.tree import format_bytes
    from ..data import open_shards, tokenize

    console = make_console(soft_wrap=True)
    with show_task(make_console(stderr=True), "tokenizing"):
        shards = tokenize(arguments.path, arguments.out, arguments.tokenizer, arguments.tokens)
    stream = open_shards(shards)
    size = format_bytes(sum(path.stat().st_size for path in shards))
    console.print(
        f"{arguments.out}: {stream.size:,} tokens in {len(stream.ends):,} documents, "
        f"{len(shards)} shards, {size}; vocabulary {stream.vocabulary}"
    )
    fields = [f"data.path={arguments.out}"]
    if arguments.tokenizer:
        fields += [f"data.tokenizer={arguments.tokenizer}", f"model.vocab={stream.vocabulary}"]
    console.print("shardkit train", *(f"--set {field}" for field in fields))
    return 0
