"""Which data a run reads, and how it is cut into rows."""

import dataclasses

from .._core.errors import DataError, Problem, raise_all
from .._core.options import check_options


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text or tokens, and how they are cut.

    Attributes:
      path: a folder or a file of text; a folder or a file of token shards (`.bin`, `.npy`, see
        `sk.data.write_tokens`); None for the Python standard library's source.
      seq_len: tokens in one row; a token is a byte where there is no tokenizer.
      batch_size: rows in one step, over all devices.
      seed: of the order of rows.
      held_out: expected fraction of files that are only scored; of one file, and of token
        shards, the last part.
      overlap: tokens of context that a held-out row shares with the row before. Each token is
        scored once all the same; more overlap gives it more context and costs more rows.
      tokenizer: JSON file of the `tokenizers` library. It makes tokens of text, where None is for
        bytes; of token shards it tells what text they stand for, where None is for unknown.
      packing: whether a training row holds whole documents, of which none sees another, instead
        of a window over one document behind another. A longer document is cut.
      prefetch: batches that are read ahead and put on the devices while a step runs; 0 reads
        each one when it is asked for.
    """

    path: str | None = None
    seq_len: int = 256
    batch_size: int = 8
    seed: int = 0
    held_out: float = 0.05
    overlap: int = 0
    tokenizer: str | None = None
    packing: bool = False
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Refuses sizes that no text could satisfy."""
        check_options(self, DataError, "The data cannot be read this way.", "data.")
        checks = {
            f"seq_len={self.seq_len}": (self.seq_len >= 1, "must be at least 1.", "seq_len=256"),
            f"batch_size={self.batch_size}": (
                self.batch_size >= 1,
                "must be at least 1.",
                "batch_size=8",
            ),
            f"held_out={self.held_out:g}": (
                0 < self.held_out < 1,
                "is a share of the files: more than 0, less than 1.",
                "held_out=0.05",
            ),
            f"overlap={self.overlap}": (
                0 <= self.overlap < max(self.seq_len, 1),
                f"must be at least 0 and less than data.seq_len={self.seq_len}.",
                "overlap=0",
            ),
            f"prefetch={self.prefetch}": (self.prefetch >= 0, "must be at least 0.", "prefetch=2"),
        }
        problems = [
            Problem(f"data.{name}", why, f"--set data.{fix}")
            for name, (holds, why, fix) in checks.items()
            if not holds
        ]
        raise_all(DataError, "The data cannot be cut this way.", problems)
