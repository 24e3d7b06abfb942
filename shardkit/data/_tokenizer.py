"""Tokenizers: every byte is a token, or a file of the `tokenizers` library decides."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._core.errors import DataError, Problem, format_problems, raise_all
from .._core.io._files import check_regular, local_path
from ._config import DataConfig

BYTES = 256
BYTE_TOKENIZER = "bytes"
"""The name of the byte tokenizer in `data.tokenizer`."""

# Ids of a text, u32[n], and the characters [start, stop) that each stands for, i64[n, 2].
Encoded = tuple[np.ndarray, np.ndarray]

# Names that common tokenizers give the token between documents.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """Encodes text as tokens, and decodes tokens."""

    @property
    def name(self) -> str:
        """Identifies the tokenizer in a checkpoint."""
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
        """Returns the text of ids that a model sampled; it can end inside a character."""
        ...

    @property
    def tokens(self) -> Mapping[str, int]:
        """Ids by the names of tokens; of bytes none has a name."""
        ...

    def encode_spans(self, texts: Sequence[str], start: bool = False) -> list[Encoded]:
        """Returns the ids of each text, and the characters that each id stands for.

        Args:
          texts: any text; names of special tokens in it become these tokens.
          start: whether to put in front what the tokenizer starts documents with.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Every byte is a token; 0, which text does not contain, is between documents."""

    name: str = BYTE_TOKENIZER
    vocabulary: int = BYTES
    end: int | None = 0

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns u8 views of the documents."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode(self, ids: np.ndarray) -> bytes:
        r"""Returns the ids as bytes, not necessarily valid UTF-8.

        >>> ByteTokenizer().decode(np.array([104, 105, 255]))
        b'hi\xff'
        """
        return ids.astype(np.uint8).tobytes()

    @property
    def tokens(self) -> Mapping[str, int]:
        """No byte has a name."""
        return {}

    def encode_spans(self, texts: Sequence[str], start: bool = False) -> list[Encoded]:
        """Returns the bytes of each text, and the character that each is part of.

        >>> [(ids, spans)] = ByteTokenizer().encode_spans(["aé"])
        >>> ids.tolist(), spans.tolist()
        ([97, 195, 169], [[0, 1], [1, 2], [1, 2]])
        """
        encoded = []
        for text in texts:
            at = np.repeat(np.arange(len(text)), [len(char.encode()) for char in text])
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
            encoded.append((ids, np.stack([at, at + 1], 1)))
        return encoded


@dataclasses.dataclass(frozen=True, eq=False)
class FileTokenizer:
    """A tokenizer of the `tokenizers` library."""

    path: Path  # of its JSON file

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _load_library_tokenizer(self.path)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Ids by the names of tokens."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def _behind(self) -> list[int]:
        """Ids that the tokenizer itself puts behind a document."""
        probe = self._tokenizer.encode("a")
        last = max(
            (i for i, added in enumerate(probe.special_tokens_mask) if not added), default=-1
        )
        return probe.ids[last + 1 :] if last >= 0 else []

    @functools.cached_property
    def _properties(self) -> tuple[str, int, int | None]:
        ids = self.tokens
        name = f"{self.path.name} {zlib.crc32(self.path.read_bytes()):08x}"
        end = next((ids[end] for end in _END_NAMES if end in ids), None)
        end = self._behind[-1] if self._behind else end
        return name, max(ids.values(), default=-1) + 1, end

    @property
    def name(self) -> str:
        """The file's name and CRC-32."""
        return self._properties[0]

    @property
    def vocabulary(self) -> int:
        """The largest id plus one."""
        return self._properties[1]

    @property
    def end(self) -> int | None:
        """What the tokenizer itself puts behind a document, else its first of `_END_NAMES`."""
        return self._properties[2]

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns each document's ids, u32; raises DataError for one that is not UTF-8."""
        texts = [_decode_utf8(document) for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_spans(self, texts: Sequence[str], start: bool = False) -> list[Encoded]:
        """Returns the ids of each text, and the characters that each id stands for.

        Without `start` the first of a text is not what the tokenizer starts documents with. The
        last is never what it ends them with: an example may be the beginning of one.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=start)
        added = len(self._behind) if start else 0
        return [
            (np.asarray(e.ids, np.uint32)[:n], np.asarray(e.offsets, np.int64).reshape(-1, 2)[:n])
            for e in encodings
            for n in (len(e.ids) - added,)
        ]

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns UTF-8 that shows the ends of documents; ids without a token are skipped."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode()


def load_tokenizer(tokenizer: str | None) -> Tokenizer:
    """Returns the byte tokenizer for None or `bytes`, else the tokenizer of a JSON file.

    Raises:
      DataError: the file is missing or not a tokenizer, or the library is not installed.
    """
    if tokenizer is None or tokenizer == BYTE_TOKENIZER:
        return ByteTokenizer()
    from_file = FileTokenizer(local_path(tokenizer, DataError))
    assert from_file.vocabulary  # reads the file now, so that errors come early
    return from_file


def load_fitting_tokenizer(config: DataConfig, vocabulary: int | None) -> Tokenizer:
    """Loads the config's tokenizer; raises DataError if the model has not an id for each token."""
    tokenizer = load_tokenizer(config.tokenizer)
    if vocabulary is not None and tokenizer.vocabulary > vocabulary:
        by_byte = isinstance(tokenizer, ByteTokenizer)
        what = "text is read by the byte, which takes" if by_byte else "it has"
        why = f"{what} {tokenizer.vocabulary} ids; the model has model.vocab={vocabulary}."
        fix = (
            f"--set model.vocab={tokenizer.vocabulary}; or, where the weights fix the vocabulary, "
        )
        fix += f"--set data.tokenizer=FILE.json of at most {vocabulary} ids"
        problem = Problem(f"data.tokenizer={config.tokenizer}", why, fix)
        raise_all(DataError, "The tokens do not fit the model.", [problem])
    return tokenizer


def _decode_utf8(document: bytes) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        around = document[max(0, error.start - 20) : error.end + 20]
        why = f"{around!r} is not UTF-8: {error.reason}"
        fix = "convert the file, or leave data.tokenizer out to train on bytes"
        problem = Problem(f"byte {error.start:,} of a file", why, fix)
        raise DataError(format_problems("The text cannot be tokenized.", [problem])) from error


def _load_library_tokenizer(path: Path) -> Any:
    subject = f"data.tokenizer={str(path)!r}"
    try:
        import tokenizers

        check_regular(path)
        return tokenizers.Tokenizer.from_str(path.read_text())
    except ImportError:
        why, fix = "the library `tokenizers` is not installed", "pip install 'shardkit[tokenizers]'"
    except OSError as error:
        why, fix = f"{error.strerror}", "--set data.tokenizer=tokenizer.json"
    except Exception as error:  # the library raises nothing more specific
        why = f"is not a tokenizer file: {error}"
        fix = "the tokenizer.json that `tokenizers` saves, or leave data.tokenizer out for bytes"
    raise DataError.of("The tokenizer cannot be loaded.", subject, f"{why}.", fix)
