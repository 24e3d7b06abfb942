"""`tokenize`: text into token shards, once, instead of at every start of a run."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .._core.errors import DataError
from .._core.io._files import local_path
from ._read_text import read_documents
from ._shards import write_tokens
from ._tokenizer import Tokenizer, load_tokenizer

# Documents that a tokenizer encodes at once, on every core.
_AT_ONCE = 256


def tokenize(
    path: str | Path, folder: str | Path, tokenizer: str | None = None, tokens: int = 2**28
) -> list[Path]:
    """Writes text as token shards; each file is a document, followed by the tokenizer's end id.

    Args:
      path: a folder of text, or one file.
      folder: where the shards go; created if missing, and must be empty.
      tokenizer: JSON file of the `tokenizers` library; None for bytes.
      tokens: a shard ends with the document that brings it to so many tokens.

    Returns:
      The shards, `tokens-00000.bin` and so on, for `data.path`.

    Raises:
      DataError: the text or the tokenizer cannot be read, or the folder is not empty.
    """
    folder = local_path(folder, DataError)
    if folder.is_dir() and (existing := sorted(folder.iterdir())):
        why = f"holds {existing[0].name}; nothing is overwritten."
        fix = f"{folder}-2, or another empty folder"
        raise DataError.of("The shards need an empty folder.", str(folder), why, fix)
    encoder = load_tokenizer(tokenizer)
    documents, shards = _encode_documents(path, encoder), []
    for document in documents:
        folder.mkdir(parents=True, exist_ok=True)
        shard = itertools.chain([document], _take_tokens(documents, tokens - len(document)))
        name = f"tokens-{len(shards):05d}.bin"
        shards.append(write_tokens(folder / name, shard, encoder.vocabulary, encoder.end))
    if not shards:
        fix = "a folder with text in it"
        raise DataError.of("There is nothing to tokenize.", str(path), "holds no text.", fix)
    return shards


def _encode_documents(path: str | Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    texts = read_documents(path)
    while batch := list(itertools.islice(texts, _AT_ONCE)):
        yield from (ids for ids in tokenizer.encode(batch) if len(ids))


def _take_tokens(documents: Iterator[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Yields documents until they have `n` tokens; the others stay in the iterator."""
    while n > 0 and (document := next(documents, None)) is not None:
        n -= len(document)
        yield document
