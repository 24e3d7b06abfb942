"""What a token is: a byte, or what a tokenizer's file says."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._core.errors import DataError, Problem, format_problems

BYTES = 256

# What the common tokenizers call the token that stands between documents.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Coder(Protocol):
    """Turns text into tokens, and tokens into text."""

    @property
    def name(self) -> str:
        """What recognizes it in a checkpoint."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        ...

    @property
    def end(self) -> int | None:
        """Id between documents; None for none."""
        ...

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns each document's ids."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the text of ids that a model drew, which need be no whole text."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteCoder:
    """Every byte is a token; 0, which no text holds, stands between documents."""

    name: str = "bytes"
    vocabulary: int = BYTES
    end: int | None = 0

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns u8 views of the documents."""
        return [np.frombuffer(one, np.uint8) for one in documents]

    def decode(self, ids: np.ndarray) -> bytes:
        r"""Returns the ids as bytes, which need not be UTF-8.

        >>> ByteCoder().decode(np.array([104, 105, 255]))
        b'hi\xff'
        """
        return ids.astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerCoder:
    """A tokenizer of the `tokenizers` library.

    Attributes:
      path: of its JSON file.
    """

    path: Path

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _load(self.path)

    @functools.cached_property
    def _facts(self) -> tuple[str, int, int | None]:
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        name = f"{self.path.name} {zlib.crc32(self.path.read_bytes()):08x}"
        end = next((ids[one] for one in _ENDS if one in ids), None)
        return name, max(ids.values(), default=-1) + 1, end

    @property
    def name(self) -> str:
        """The file's name and CRC-32."""
        return self._facts[0]

    @property
    def vocabulary(self) -> int:
        """The largest id and one more."""
        return self._facts[1]

    @property
    def end(self) -> int | None:
        """The id of the first known name for the end of a text that the tokenizer has."""
        return self._facts[2]

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns each document's ids, u32.

        Raises:
          DataError: a document is not UTF-8.
        """
        texts = [_decoded(one) for one in documents]
        coded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.uint32) for one in coded]

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns UTF-8, in which ends of documents show; ids without a token are left out."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode()


def coder_of(tokenizer: str | None) -> Coder:
    """Returns what a config asks for: bytes, or a tokenizer's file.

    Raises:
      DataError: the file is missing or no tokenizer, or the library is not installed.
    """
    if tokenizer is None:
        return ByteCoder()
    coder = TokenizerCoder(Path(tokenizer).expanduser())
    assert coder.vocabulary  # reads the file
    return coder


def _decoded(document: bytes) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        around = document[max(0, error.start - 20) : error.end + 20]
        why = f"{around!r} is not UTF-8: {error.reason}"
        fix = "convert the file, or leave data.tokenizer out to train on bytes"
        problem = Problem(f"byte {error.start:,} of a file", why, fix)
        raise DataError(format_problems("The text cannot be tokenized.", [problem])) from error


def _load(path: Path) -> Any:
    subject = f"data.tokenizer={str(path)!r}"
    try:
        import tokenizers

        return tokenizers.Tokenizer.from_str(path.read_text())
    except ImportError:
        why, fix = "the library `tokenizers` is not installed", "pip install 'shardkit[tokenizers]'"
    except OSError as error:
        why, fix = f"{error.strerror}", "--set data.tokenizer=tokenizer.json"
    except Exception as error:  # the library raises nothing more special
        why = f"is no file of a tokenizer: {error}"
        fix = "the tokenizer.json that `tokenizers` saves, or leave data.tokenizer out for bytes"
    problem = Problem(subject, f"{why}.", fix)
    raise DataError(format_problems("There is no tokenizer.", [problem]))
