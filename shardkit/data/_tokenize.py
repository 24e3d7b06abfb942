"""Text into token shards, once, instead of at every start of a run."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .._core.errors import DataError, Problem, format_problems
from ._corpus import documents
from ._shards import write_tokens
from ._tokenizer import Coder, coder_of

# Documents that a tokenizer gets at once: it uses every core.
_AT_ONCE = 256


def tokenize(
    path: str | Path, folder: str | Path, tokenizer: str | None = None, tokens: int = 2**28
) -> list[Path]:
    """Writes text as token shards, each file a document with the tokenizer's end behind it.

    Args:
      path: a folder of text, or one file.
      folder: where to; it is made, and has to be empty.
      tokenizer: JSON file of the `tokenizers` library; None for bytes.
      tokens: a shard is closed with the document that brings it to so many.

    Returns:
      The shards, `tokens-00000.bin` and so on, for `data.path`.

    Raises:
      DataError: the text or the tokenizer cannot be read, or the folder holds something.
    """
    folder = Path(folder)
    if folder.is_dir() and (there := sorted(folder.iterdir())):
        why = f"holds {there[0].name}; nothing is written over."
        problem = Problem(str(folder), why, f"{folder}-2, or another empty folder")
        raise DataError(format_problems("The shards have nowhere to go.", [problem]))
    coder = coder_of(tokenizer)
    coded, made = _coded(path, coder), []
    for first in coded:
        folder.mkdir(parents=True, exist_ok=True)
        shard = itertools.chain([first], _until(coded, tokens - len(first)))
        name = f"tokens-{len(made):05d}.bin"
        made.append(write_tokens(folder / name, shard, coder.vocabulary, coder.end))
    if not made:
        problem = Problem(str(path), "holds no text.", "a folder with text in it")
        raise DataError(format_problems("There is nothing to tokenize.", [problem]))
    return made


def _coded(path: str | Path, coder: Coder) -> Iterator[np.ndarray]:
    texts = documents(path)
    while some := list(itertools.islice(texts, _AT_ONCE)):
        yield from (one for one in coder.encode(some) if len(one))


def _until(coded: Iterator[np.ndarray], room: int) -> Iterator[np.ndarray]:
    """Documents until there are so many tokens; the rest stays in the iterator."""
    while room > 0 and (one := next(coded, None)) is not None:
        room -= len(one)
        yield one
