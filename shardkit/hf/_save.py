"""`save`: parameters as a Hugging Face folder, each shard written where it belongs in its file."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._core.errors import CheckpointError, Problem, raise_all
from .._core.io._files import local_path, os_errors_as, sync_folder
from .._core.io._foreign import is_own
from .._core.options import check_arguments
from .._core.own_sharding import on_any_mesh
from .._core.tree import leaves_by_path, short_type
from .._core.types import Params
from ..checkpoint._collective_errors import collective_errors, is_first_process, share_text
from ..lm import decoder_model
from ..rules import list_named_leaves, matches
from ._config import CONFIG, decoder_config, find_family
from ._table import (
    LeafSource,
    Table,
    assign,
    count_uses,
    find_sources,
    keeps_values,
    padding_problems,
)
from ._tensor_files import (
    INDEX,
    NAMES,
    SINGLE,
    StoredTensor,
    create_file,
    lay_out,
    read_folder,
    read_index,
    split_files,
)

_HEADLINE = "Nothing was exported."
# What is copied beside the weights: configuration and tokenizer, never code.
_CARRIED = (
    *("config.json", "generation_config.json", "chat_template*", "tokenizer*", "vocab*"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
)
_CARRIED_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_LARGEST_CARRIED = 2**28  # the largest tokenizers have some 40 MB

Types = dict[str, tuple[tuple[int, ...], str]]


def save(
    path: str | os.PathLike[str],
    params: Params,
    *,
    like: str | os.PathLike[str],
    table: Table | None = None,
    vocab_padding: int = 0,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes parameters as a folder that `transformers` loads.

    `config.json` and the files of the tokenizer are those of `like`, but for code, pickles and
    links out of the folder. If `like` has weights too,
    the tensors get their dtypes and their division into files, so that a folder that was loaded
    is written again bit by bit; floats are rounded where its dtype is narrower. Each shard is
    copied from its device to its place in a mapped file, so the host never holds a whole leaf.
    Several processes share one file system and make the call together; each writes its shards.

    Args:
      path: the new folder; it appears when it is complete, and nothing is overwritten.
      params: pytree of arrays: `state.params`.
      like: a Hugging Face folder of the same model, with or without weights.
      table: as for `load`.
      vocab_padding: rows of the tables that no token has, which are not written.
      max_file_bytes: where `like` has no weights, the most bytes of a file with several tensors.

    Raises:
      CheckpointError: the folder exists or cannot be written, the parameters are not those of
        `like`, or a finite value would become infinite in its dtype.
      ConfigError: the family in `config.json` is unknown, or the file describes no decoder.
    """
    check_arguments(
        CheckpointError,
        _HEADLINE,
        vocab_padding=(vocab_padding, int),
        max_file_bytes=(max_file_bytes, int),
    )
    raise_all(CheckpointError, _HEADLINE, padding_problems(vocab_padding))
    target, model = (local_path(p, CheckpointError, _HEADLINE) for p in (path, like))
    with collective_errors():
        leaves = leaves_by_path(params)
        raise_all(CheckpointError, _HEADLINE, [*_early_problems(target, leaves)])
        has_weights = any((model / name).is_file() for name in (INDEX, SINGLE))
        weights = read_folder(model) if has_weights else {}
        index = read_index(model) if weights else {}
        unlike: list[Problem] = []
        if table is None:
            family = find_family(model)
            table = family.named_like(weights)
            weights = family.parameters(weights, leaves)
            unlike = [] if weights else _config_problems(model, leaves, vocab_padding)
        sources, more = find_sources(table, leaves, vocab_padding)
        types, different = _tensor_types(sources, weights)
        problems = [*unlike, *more, *different]
        fix = "like= the folder of their model; with adapters, merge(state.params) of sk.lora"
        raise_all(CheckpointError, f"The parameters are not those of {model}.", problems, fix)
    files = _divide(types, index, weights, max_file_bytes)
    with _new_folder(target) as folder:
        placed: dict[str, StoredTensor] = {}
        with _together(target):
            for name, here in files.items():
                tensors = lay_out(folder / name, here)
                placed |= tensors
                if is_first_process():
                    create_file(folder / name, tensors)
        with _together(target):
            for source in sources.values():
                _write_leaf(source, leaves[source.path], placed)
            _sync_files(folder / name for name in files)
        with _together(target):
            if is_first_process():
                if placed.keys() == index.keys():  # of the same sizes too
                    shutil.copyfile(model / INDEX, folder / INDEX)
                elif index or len(files) > 1:
                    _write_index(folder, placed)
                _carry_files(model, folder)
                _sync_files(folder.iterdir())


def _early_problems(target: Path, leaves: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong before anything is read."""
    if target.exists():
        yield Problem(str(target), "exists already", "another folder")
    for path, x in leaves.items():
        if not isinstance(x, jax.Array | np.ndarray):
            yield Problem(path, f"is {type(x).__name__}, not an array with values", "state.params")


@contextlib.contextmanager
def _together(target: Path) -> Iterator[None]:
    """Of several processes the next block starts in none before this one has ended in all."""
    fix = "a folder with free space, and permission to write there"
    with collective_errors(), os_errors_as(CheckpointError, _HEADLINE, target, fix):
        yield


def _sync_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as opened:
            os.fsync(opened.fileno())


def _config_problems(model: Path, leaves: Mapping[str, Any], padding: int) -> list[Problem]:
    """Leaves that are missing, extra or of another shape than `config.json` describes."""
    # Keys that are unknown change no shape of a leaf that is known.
    config = decoder_config(model, ignore=["*"], vocab_padding=padding)
    key = jax.eval_shape(lambda: jax.random.key(0))
    named = list_named_leaves(on_any_mesh(jax.eval_shape)(decoder_model(config).init, key))
    wanted = {leaf.path: leaf.shape for leaf in named}
    problems = []
    for path in {**wanted, **leaves}:
        leaf = leaves.get(path)
        found, dtype = (None, "float32") if leaf is None else (tuple(leaf.shape), leaf.dtype)
        if found != wanted.get(path):
            here, there = (
                "absent" if shape is None else short_type(shape, np.dtype(dtype))
                for shape in (found, wanted.get(path))
            )
            problems.append(Problem(path, f"is {here}, and {there} by {CONFIG}"))
    return problems


def _tensor_types(
    sources: Mapping[str, LeafSource], weights: Mapping[str, StoredTensor]
) -> tuple[Types, list[Problem]]:
    """Shape and dtype of every tensor; and the differences from the tensors of `like`."""
    types: Types = {}
    problems: list[Problem] = []
    for source in sources.values():
        dtype = np.dtype(source.dtype).name
        if dtype not in NAMES:
            problems.append(Problem(source.type, "has a dtype that safetensors files lack"))
        types |= dict.fromkeys(source.names.values(), (source.stored_shape, dtype))
    problems += [
        Problem(name, "is two parameters" if twice else f"gets only {share} from parameters")
        for name, (share, twice) in count_uses(sources).items()
        if twice or share != 1
    ]
    if not weights:
        return types, problems
    unused = {name: tensor for name, tensor in weights.items() if name not in types}
    for source in sources.values():
        problems += source.find_problems(weights, unused)
    problems += [
        Problem(name, f"is {weights[name].type} there, and {source.type} does not become that")
        for source in sources.values()
        for name in source.names.values()
        if name in weights and not keeps_values(source.dtype, weights[name].dtype, may_round=True)
    ]
    problems += [
        Problem(name, f"is {tensor.type} there, and no parameter gives it")
        for name, tensor in unused.items()
    ]
    order = sorted(weights, key=lambda name: (weights[name].file, weights[name].offset))
    return {name: (weights[name].shape, weights[name].dtype) for name in order}, problems


def _divide(
    types: Types, index: Mapping[str, str], weights: Mapping[str, StoredTensor], largest: int
) -> dict[str, Types]:
    """Divides tensors into files: those of `like`, else as few as their size allows."""
    if weights:
        files: dict[str, Types] = {}
        for name, kind in types.items():
            files.setdefault(index.get(name, SINGLE), {})[name] = kind
        return files
    parts = list(split_files(types, largest))
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": p for n, p in enumerate(parts, 1)}


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder that becomes `target` when the block ends, and is deleted if it raises."""
    name = share_text(f".{target.name}.{secrets.token_hex(4)}.part")
    temporary = target.with_name(name)
    try:
        with _together(target):
            if is_first_process():
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
        yield temporary
        with _together(target):
            if is_first_process():
                sync_folder(temporary)
                if target.exists():
                    raise FileExistsError(17, "File exists", str(target))
                os.rename(temporary, target)
                sync_folder(target.parent)
    finally:
        if is_first_process():
            shutil.rmtree(temporary, ignore_errors=True)


def _write_leaf(source: LeafSource, leaf: Any, placed: Mapping[str, StoredTensor]) -> None:
    """Copies every shard of a leaf into the tensors; of equal shards the first."""
    whole = tuple(slice(0, n) for n in source.shape)
    shards = [(whole, leaf)] if is_first_process() else []
    if isinstance(leaf, jax.Array):
        shards = [(s.index, s.data) for s in leaf.addressable_shards if s.replica_id == 0]
    for index, data in shards:
        values = np.asarray(data)
        for name, part, at in source.pieces(index):
            view = source.view(placed[name].map("r+"))
            assign(view, part, values[at], name)


def _write_index(folder: Path, placed: Mapping[str, StoredTensor]) -> None:
    sizes = {"total_size": sum(tensor.nbytes for tensor in placed.values())}
    index = {"metadata": sizes, "weight_map": {n: t.file.name for n, t in sorted(placed.items())}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _carry_files(model: Path, folder: Path) -> None:
    for path in sorted(model.iterdir()):
        carried = path.suffix in _CARRIED_SUFFIXES and any(matches(g, path.name) for g in _CARRIED)
        if path.name == CONFIG and not is_own(path):
            why = "is a link out of the folder"
            raise CheckpointError.of(_HEADLINE, str(path), why, "a copy of what it points to")
        if carried and path.is_file() and is_own(path):
            if path.stat().st_size > _LARGEST_CARRIED:
                why = f"has {path.stat().st_size} bytes: not a tokenizer"
                raise CheckpointError.of(_HEADLINE, str(path), why, "delete it")
            shutil.copyfile(path, folder / path.name)
