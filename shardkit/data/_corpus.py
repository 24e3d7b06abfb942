"""Training and validation text: as bytes that a tokenizer encodes, or as tokens already."""

import dataclasses
import functools
import zlib

import numpy as np

from .._core.errors import count
from ._stream import Stream, TokenFile
from ._tokenizer import ByteTokenizer, Tokenizer

# Behind each file in `Corpus`, so that a model learns where files begin.
END = b"\0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes of text in two parts that share no file: one to train on, one to score."""

    source: str  # what was read, in words
    train: bytes = dataclasses.field(repr=False)  # the training files, each followed by a zero byte
    validation: bytes = dataclasses.field(repr=False)  # the same for the files to score
    train_files: int  # number of files in `train`
    validation_files: int  # number of files in `validation`
    tokenizer: Tokenizer = dataclasses.field(default_factory=ByteTokenizer)  # encodes the bytes

    @property
    def unit(self) -> str:
        """What a token is: `byte` or `token`."""
        return "byte" if isinstance(self.tokenizer, ByteTokenizer) else "token"

    @property
    def train_tokens(self) -> Stream:
        """The training files, encoded."""
        return self._streams[0]

    @property
    def validation_tokens(self) -> Stream:
        """The validation files, encoded."""
        return self._streams[1]

    @property
    def validation_bytes(self) -> int:
        """Bytes of the validation text, with the zero bytes behind its files."""
        return len(self.validation)

    def describe(self) -> str:
        """Returns files, bytes and, with a tokenizer, tokens of the two parts."""
        train = f"{self.train_files} files, {len(self.train):,} bytes"
        validation = f"{self.validation_files} files, {len(self.validation):,} bytes"
        if self.unit == "token":
            train += f", {self.train_tokens.size:,} tokens"
            validation += f", {self.validation_tokens.size:,} tokens"
        return f"{train}; validation: {validation}"

    def identify(self) -> dict[str, str]:
        """Returns the tokenizer's name, and the CRC-32 of the bytes of both parts."""
        sums = [f"{zlib.crc32(text):08x}" for text in (self.train, self.validation)]
        return {"tokens": self.tokenizer.name, "crc32": sums[0], "validation": sums[1]}

    @functools.cached_property
    def _streams(self) -> tuple[Stream, Stream]:
        return self._encode(self.train, "train"), self._encode(self.validation, "validation")

    def _encode(self, text: bytes, part: str) -> Stream:
        if self.unit == "byte":
            tokens = np.frombuffer(text, np.uint8)
            ends = np.flatnonzero(tokens == 0) + 1
        else:
            end = self.tokenizer.end
            tail = np.array([] if end is None else [end], np.uint32)
            encoded = self.tokenizer.encode(text.split(END)[:-1])
            documents = [np.concatenate([ids, tail]) for ids in encoded]
            tokens, ends = np.concatenate(documents), np.cumsum([len(ids) for ids in documents])
        file = TokenFile(f"{self.source} ({part})", tokens, ends)
        return Stream((file,), self.tokenizer.vocabulary, self.tokenizer.end)


@dataclasses.dataclass(frozen=True)
class TokenCorpus:
    """Token shards in two parts that share no document: one to train on, one to score.

    A single document is cut in two.
    """

    source: str  # what was read, in words
    train_tokens: Stream = dataclasses.field(repr=False)  # the tokens to train on
    validation_tokens: Stream = dataclasses.field(repr=False)  # the tokens to score
    tokenizer: Tokenizer | None = None  # decodes them; None if it is not known
    unit: str = dataclasses.field(default="token", init=False)
    validation_bytes: None = dataclasses.field(default=None, init=False)

    def describe(self) -> str:
        """Returns tokens and documents of the two parts."""
        train, validation = (
            f"{stream.size:,} tokens in {count(len(stream.ends), 'document')}"
            for stream in (self.train_tokens, self.validation_tokens)
        )
        return f"{train}; validation: {validation}"

    def identify(self) -> dict[str, str]:
        """Returns that these are shards, and a checksum of the tokens of both parts."""
        sums = [stream.checksum() for stream in (self.train_tokens, self.validation_tokens)]
        return {"tokens": "shards", "crc32": sums[0], "validation": sums[1]}


TokenizedCorpus = Corpus | TokenCorpus
