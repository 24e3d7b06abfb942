"""`Text`: batches of text as a function of (seed, step, row) alone.

An epoch is a permutation of rows. Row `r` of step `s` is global row `s · batch_size + r`; dividing
by the rows of an epoch gives the epoch and the place in its permutation. So any process can read
any step in any order, and neither a mesh nor a restart changes the batches.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from .._core.errors import DataError, Problem, raise_all
from ._config import DataConfig
from ._corpus import TokenCorpus, TokenizedCorpus
from ._read_text import list_shards, read_corpus, read_standard_library
from ._sequences import ContiguousSequences, PackedSequences, Sequences, TokenBatch, segment_ids_at
from ._shards import open_shards
from ._stream import Stream
from ._tokenizer import Tokenizer, load_fitting_tokenizer

# Tokens of each shard that are compared with a tokenizer's ids before a run starts.
_CHECKED_TOKENS = 2**20


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus cut into rows; a `BatchSource`."""

    corpus: TokenizedCorpus  # the tokens to train on and those to score
    config: DataConfig  # how they are cut

    def __post_init__(self) -> None:
        """Refuses rows longer than the text, and batches of more rows than an epoch has."""
        length, batch_size = self.config.seq_len, self.config.batch_size
        problems = []
        sizes = {"train": self.train.size, "validation": self.validation_tokens}
        fix = f"--set data.seq_len={max(1, min(sizes.values()) // 2)}"
        for part, size in sizes.items():
            if length > size:
                why = f"data.seq_len={length} is longer than all its {size:,} {self.unit}s."
                problems.append(Problem(f"{self.corpus.source} ({part})", why, fix))
        if not problems and batch_size > self.rows_per_epoch:
            n = self.rows_per_epoch
            why = f"data.batch_size={batch_size}, but an epoch has {n} rows of {length}."
            fix = f"--set data.batch_size={n}, or a smaller data.seq_len"
            problems.append(Problem(self.corpus.source, why, fix))
        raise_all(DataError, "There is too little text for these rows.", problems)

    @property
    def unit(self) -> str:
        """What a token is: `byte` or `token`."""
        return self.corpus.unit

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Decodes tokens; None for shards whose tokenizer is not known."""
        return self.corpus.tokenizer

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        return self.config.batch_size

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self._sequences.per_epoch

    @property
    def train(self) -> Stream:
        """The tokens to train on."""
        return self.corpus.train_tokens

    @property
    def validation(self) -> Stream:
        """The tokens to score."""
        return self.corpus.validation_tokens

    @property
    def validation_tokens(self) -> int:
        """Number of tokens that the validation batches score, each once."""
        return self.validation.predicted

    @property
    def validation_bytes(self) -> int | None:
        """Bytes of the validation text; None if only its tokens are known."""
        return self.corpus.validation_bytes

    @property
    def validation_steps(self) -> int:
        """Number of batches that cover the validation tokens."""
        rows = -(-self.validation_tokens // self._stride)
        return -(-rows // self.config.batch_size)

    def describe(self) -> str:
        """Returns one line: what is read, and the sizes of training and validation text."""
        return f"{self.corpus.source}: {self.corpus.describe()}"

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> TokenBatch:
        """Returns the training batch of a step, or some of its rows.

        Args:
          step: any step, from 0.
          rows: the rows of the batch to make; the others cost nothing.

        Returns:
          `inputs` i32[n, length] and `targets` i32[n, length], the token that follows each input;
          `weights` f32[n, length], 0 where a target does not count; with `packing` also
          `segment_ids` i32[n, length], from 1, and 0 on padding.
        """
        n = self.config.batch_size
        return self._sequences.make(np.arange(step * n, (step + 1) * n)[rows], self.config.seed)

    def validation_batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> TokenBatch:
        """Returns the validation batch of a step in `range(validation_steps)`, in file order.

        Targets that an earlier row scored, and the padding behind the last token, have weight 0:
        over all steps each validation token has weight 1 exactly once. With `packing` rows are
        contiguous too, and `segment_ids` separate their documents.
        """
        starts, masks = self._locate_validation_rows(step, rows)
        tokens = self.validation.read(starts, self.config.seq_len + 1)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **masks}

    def validation_weight(self, step: int) -> int:
        """Number of tokens that all rows of a validation batch score, without reading them."""
        return int(self._locate_validation_rows(step, slice(None))[1]["weights"].sum())

    def _locate_validation_rows(
        self, step: int, rows: slice | np.ndarray
    ) -> tuple[np.ndarray, TokenBatch]:
        """Returns where validation rows start, and which of their targets they score.

        Row r scores the targets [r · stride, (r + 1) · stride), the last `stride` of its
        `length` positions. With length 8 and overlap 2, stride is 6:

            row 0  reads  0 …  7    scores  0 …  5    (no text before: starts at 0)
            row 1  reads  4 … 11    scores  6 … 11
            row 2  reads 10 … 17    scores 12 … 17
        """
        n, length, stride = self.config.batch_size, self.config.seq_len, self._stride
        ends = (np.arange(step * n, (step + 1) * n)[rows] + 1) * stride
        starts = np.maximum(ends - length, 0)
        target = starts[:, None] + np.arange(length)
        last = np.minimum(ends, self.validation_tokens)
        scored = (target >= (ends - stride)[:, None]) & (target < last[:, None])
        if not self.config.packing:
            return starts, {"weights": scored.astype(np.float32)}
        ids, same_document = segment_ids_at(self.validation, target)
        weights = (scored & same_document).astype(np.float32)
        return starts, {"weights": weights, "segment_ids": ids}

    def state(self, step: int) -> dict[str, Any]:
        """Returns the step, with how the text is cut and a checksum of it."""
        config = self.config
        settings = {"rows": config.batch_size, "length": config.seq_len, "packing": config.packing}
        settings |= {"rows_per_epoch": self.rows_per_epoch, "seed": config.seed}
        return {"batch": step, **settings, **self._identity}

    def __str__(self) -> str:
        return self.corpus.source

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        return self.corpus.identify()

    @property
    def _stride(self) -> int:
        return self.config.seq_len - self.config.overlap

    @functools.cached_property
    def _sequences(self) -> Sequences:
        cut = PackedSequences if self.config.packing else ContiguousSequences
        return cut(self.train, self.config.seq_len)


def load_text(config: DataConfig, vocabulary: int | None = None) -> Text:
    """Reads the text or token shards that a config names, and cuts them into rows.

    Args:
      config: what to read.
      vocabulary: number of ids of the model; None for as many as the text has.

    Raises:
      DataError: the text is missing, unreadable, empty or too small for the rows, or it has more
        ids than the model.
    """
    if config.path is not None and (paths := list_shards(config.path)):
        return Text(_load_shards(config, paths, vocabulary), config)
    tokenizer = load_fitting_tokenizer(config, vocabulary)
    fraction = config.validation_fraction
    text = (
        read_standard_library(fraction)
        if config.path is None
        else read_corpus(config.path, fraction)
    )
    return Text(dataclasses.replace(text, tokenizer=tokenizer), config)


def _load_shards(config: DataConfig, paths: list[Any], vocabulary: int | None) -> TokenCorpus:
    tokenizer = load_fitting_tokenizer(config, vocabulary) if config.tokenizer else None
    stream = open_shards(paths, vocabulary)
    if tokenizer is not None:
        _check_ids_known(stream, tokenizer, config)
    train, validation = stream.split(config.validation_fraction)
    return TokenCorpus(f"the token shards in {config.path}", train, validation, tokenizer)


def _check_ids_known(stream: Stream, tokenizer: Tokenizer, config: DataConfig) -> None:
    """Refuses a tokenizer that lacks ids found at the beginning of the shards."""
    largest = {file.name: int(file.tokens[:_CHECKED_TOKENS].max()) for file in stream.files}
    subject = f"data.tokenizer={config.tokenizer}"
    problems = [
        Problem(subject, f"has {tokenizer.vocabulary} ids; {name} holds id {largest_id}.")
        for name, largest_id in largest.items()
        if largest_id >= tokenizer.vocabulary
    ]
    fix = "the tokenizer that made the shards, or none: then the run ends without a sample"
    raise_all(DataError, "The tokenizer is not that of the shards.", problems, fix)
