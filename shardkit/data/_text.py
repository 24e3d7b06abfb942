"""Batches as a function of (seed, step, row) alone.

An epoch is a permutation of rows. Row `r` of step `s` is global row `s * batch + r`; its epoch
and its place in that epoch follow by division. So any step can be asked for, in any order, by
any process, and a mesh or a restart changes nothing.
"""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np

from .._core.errors import DataError, Problem, count, raise_all
from ._config import DataConfig
from ._corpus import END, Corpus, TokenCorpus, read_corpus, shard_paths, standard_library
from ._sequences import Batch, Packed, Rows, Windows, segments
from ._shards import open_shards
from ._stream import Piece, Stream
from ._tokenizer import ByteCoder, Coder, coder_of

# Tokens of each shard that a tokenizer is held against: another one's are soon past its ids.
_LOOKED_AT = 2**20


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus cut into rows.

    Attributes:
      corpus: the bytes or the tokens.
      config: how they are cut.
      coder: makes tokens of bytes, and text of tokens; of shards, `ByteCoder` says nothing.
    """

    corpus: Corpus | TokenCorpus
    config: DataConfig
    coder: Coder = dataclasses.field(default_factory=ByteCoder)

    def __post_init__(self) -> None:
        """Refuses rows longer than the text, and batches of more rows than it holds."""
        length, batch = self.config.seq_len, self.config.batch_size
        problems = []
        sizes = {"train": self.train.size, "held_out": self.held_out_tokens}
        fix = f"--set data.seq_len={max(1, min(sizes.values()) // 2)}"
        for side, size in sizes.items():
            if length > size:
                why = f"data.seq_len={length} is longer than all its {size:,} {self.unit}s."
                problems.append(Problem(f"{self.corpus.source} ({side})", why, fix))
        if not problems and batch > self.rows_per_epoch:
            why = (
                f"data.batch_size={batch}, but an epoch has {self.rows_per_epoch} rows of {length}."
            )
            fix = f"--set data.batch_size={self.rows_per_epoch}, or a smaller data.seq_len"
            problems.append(Problem(self.corpus.source, why, fix))
        raise_all(DataError, "There is too little text for these rows.", problems)

    @property
    def unit(self) -> str:
        """What a token is: `byte` or `token`."""
        return "byte" if self._bytes is not None and self.coder == ByteCoder() else "token"

    @property
    def decoder(self) -> Coder | None:
        """What makes text of tokens; None for shards whose tokenizer is not known."""
        return None if self._bytes is None and self.coder == ByteCoder() else self.coder

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        return self.config.batch_size

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch has."""
        return self._rows.per_epoch

    @functools.cached_property
    def train(self) -> Stream:
        """The tokens to train on."""
        return self._stream("train")

    @functools.cached_property
    def held_out(self) -> Stream:
        """The tokens that are only scored."""
        return self._stream("held_out")

    @property
    def held_out_tokens(self) -> int:
        """Tokens that the held-out rows score, each once."""
        return self.held_out.predicted

    @property
    def held_out_bytes(self) -> int | None:
        """Bytes of the held-out text; None where tokens are all that is known of it."""
        return None if self._bytes is None else len(self._bytes.held_out)

    def describe(self) -> str:
        """Says in a line what is read and what is held out."""
        raw = self._bytes
        if raw is None:
            sides = (self.train, self.held_out)
            said = [f"{s.size:,} tokens in {count(len(s.ends), 'document')}" for s in sides]
        else:
            said = [
                f"{raw.train_files} files, {len(raw.train):,} bytes",
                f"{raw.held_out_files} files, {len(raw.held_out):,} bytes",
            ]
            if self.unit == "token":
                sizes = (self.train.size, self.held_out.size)
                said = [f"{one}, {size:,} tokens" for one, size in zip(said, sizes, strict=True)]
        return f"{self.corpus.source}: {said[0]}; held out: {said[1]}"

    @property
    def held_out_steps(self) -> int:
        """Number of batches that cover the held-out tokens."""
        rows = -(-self.held_out_tokens // self._stride)
        return -(-rows // self.config.batch_size)

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Returns the training batch of a step, or some of its rows.

        Args:
          step: any step, from 0.
          rows: which of the `batch` rows to make; the others cost nothing.

        Returns:
          `inputs` i32[n, length], whose position `i` is to predict position `i` of `targets`
          i32[n, length]; `weights` f32[n, length], 0 where a target does not count; with
          `packing` also `segment_ids` i32[n, length], from 1, and 0 on padding.
        """
        batch = self.config.batch_size
        return self._rows.make(np.arange(step * batch, (step + 1) * batch)[rows], self.config.seed)

    def held_out_batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Returns the held-out batch of a step in `range(held_out_steps)`, in file order.

        Targets that an earlier row scored already, and the padding behind the last token, have
        weight 0: over all steps each held-out token has weight 1 exactly once. With `packing`
        rows are windows all the same, in which no document sees another.
        """
        starts, masks = self._held_out_rows(step, rows)
        tokens = self.held_out.read(starts, self.config.seq_len + 1)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **masks}

    def held_out_weight(self, step: int) -> int:
        """Number of tokens that all rows of a held-out batch score, without reading them."""
        return int(self._held_out_rows(step, slice(None))[1]["weights"].sum())

    def _held_out_rows(self, step: int, rows: slice | np.ndarray) -> tuple[np.ndarray, Batch]:
        """Where held-out rows begin, and what says which of their tokens count."""
        batch, length, stride = self.config.batch_size, self.config.seq_len, self._stride
        ends = (np.arange(step * batch, (step + 1) * batch)[rows] + 1) * stride
        starts = np.maximum(ends - length, 0)
        target = starts[:, None] + np.arange(length)
        last = np.minimum(ends, self.held_out_tokens)
        counts = (target >= (ends - stride)[:, None]) & (target < last[:, None])
        if not self.config.packing:
            return starts, {"weights": counts.astype(np.float32)}
        ids, follows = segments(self.held_out, target)
        return starts, {"weights": (counts & follows).astype(np.float32), "segment_ids": ids}

    def position(self, step: int) -> dict[str, Any]:
        """Says where in the text a run is: batches are functions of the step, so the step does.

        The rest recognizes the text: the same step of other tokens would be other data.
        """
        config = self.config
        tokens = "shards" if self._bytes is None else self.coder.name
        known = {"rows": config.batch_size, "length": config.seq_len, "packing": config.packing}
        known |= {"rows_per_epoch": self.rows_per_epoch, "seed": config.seed}
        return {"batch": step, **known, "tokens": tokens, "crc32": self._checksum}

    def __str__(self) -> str:
        """Names the corpus."""
        return self.corpus.source

    @property
    def _bytes(self) -> Corpus | None:
        return self.corpus if isinstance(self.corpus, Corpus) else None

    @functools.cached_property
    def _checksum(self) -> str:
        raw = self._bytes
        return self.train.checksum() if raw is None else f"{zlib.crc32(raw.train):08x}"

    @property
    def _stride(self) -> int:
        return self.config.seq_len - self.config.overlap

    @functools.cached_property
    def _rows(self) -> Rows:
        kind = Packed if self.config.packing else Windows
        return kind(self.train, self.config.seq_len)

    def _stream(self, side: str) -> Stream:
        if isinstance(self.corpus, TokenCorpus):
            return getattr(self.corpus, side)
        raw: bytes = getattr(self.corpus, side)
        if self.unit == "byte":
            tokens = np.frombuffer(raw, np.uint8)
            ends = np.flatnonzero(tokens == 0) + 1
        else:
            tail = np.array([] if self.coder.end is None else [self.coder.end], np.uint32)
            coded = self.coder.encode(raw.split(END)[:-1])
            documents = [np.concatenate([one, tail]) for one in coded]
            tokens, ends = np.concatenate(documents), np.cumsum([len(one) for one in documents])
        piece = Piece(f"{self.corpus.source} ({side})", tokens, ends)
        return Stream((piece,), self.coder.vocabulary, self.coder.end)


def load_text(config: DataConfig, vocabulary: int | None = None) -> Text:
    """Reads and cuts the text that a config names.

    Args:
      config: what to read.
      vocabulary: ids that the model has; None for as many as it takes.

    Raises:
      DataError: it is missing, unreadable, empty, too small for the rows asked for, or has more
        ids than the model.
    """
    if config.path is not None and (paths := shard_paths(config.path)):
        coder = _coder(config, vocabulary) if config.tokenizer else ByteCoder()
        whole = open_shards(paths, vocabulary)
        if config.tokenizer:
            _check_tokens(whole, coder, config)
        train, held_out = whole.split(config.held_out)
        corpus = TokenCorpus(f"the token shards in {config.path}", train, held_out)
        return Text(corpus, config, coder)
    coder = _coder(config, vocabulary)
    text = (
        standard_library(config.held_out)
        if config.path is None
        else read_corpus(config.path, config.held_out)
    )
    return Text(text, config, coder)


def _coder(config: DataConfig, vocabulary: int | None) -> Coder:
    """What a config asks for, if the model has an id for each of its tokens."""
    coder = coder_of(config.tokenizer)
    if vocabulary is not None and coder.vocabulary > vocabulary:
        what = "text is read by the byte, which takes" if coder == ByteCoder() else "it has"
        why = f"{what} {coder.vocabulary} ids; the model has model.vocab={vocabulary}."
        fix = f"--set model.vocab={coder.vocabulary}"
        problem = Problem(f"data.tokenizer={config.tokenizer}", why, fix)
        raise_all(DataError, "The tokens do not fit the model.", [problem])
    return coder


def _check_tokens(stream: Stream, coder: Coder, config: DataConfig) -> None:
    """Refuses a tokenizer that lacks ids which stand at the beginning of the shards."""
    largest = {piece.name: int(piece.tokens[:_LOOKED_AT].max()) for piece in stream.pieces}
    subject = f"data.tokenizer={config.tokenizer}"
    problems = [
        Problem(subject, f"has {coder.vocabulary} ids; {name} holds id {largest_id}.")
        for name, largest_id in largest.items()
        if largest_id >= coder.vocabulary
    ]
    fix = (
        "the tokenizer that the shards were made with, or none: then the run ends without a sample"
    )
    raise_all(DataError, "The tokenizer is not that of the shards.", problems, fix)
