"""`DataConfig`: which data a run reads, and how it is cut into rows."""

import dataclasses
from typing import Literal

from .._core.errors import DataError, Problem, raise_all
from .._core.io._files import path_problem
from .._core.options import check_options


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text or tokens to read, and how to cut them into rows.

    Attributes:
      path: a folder or a file of text; a folder or a file of token shards (`.bin`, `.npy`, see
        `sk.data.write_tokens`); None for the Python standard library's source.
      seq_len: tokens in a row; without a tokenizer a token is a byte.
      batch_size: rows of a step, over all devices.
      seed: of the order of rows.
      validation_fraction: expected fraction of the files that are scored and never trained on;
        of a single file and of token shards, the last part.
      overlap: tokens of context that a validation row shares with the row before. Each token is
        scored once in any case; more overlap gives it more context and costs more rows.
      tokenizer: JSON file of the `tokenizers` library. It encodes text; None means bytes. With
        token shards it is only needed to decode the sample that a run ends with.
      packing: whether a training row holds whole documents, which do not attend to each other,
        instead of a contiguous part of the stream of documents. Longer documents are cut.
      format: `json_lines` for examples, one a line: chats, prompts with completions, or text, of
        which the answers alone count in the loss (see `docs/finetune.md`). With `packing` a row
        holds several examples, which do not attend to each other, else one. `tokenizer` may be
        `bytes`.
      template: how a chat is written as text: `chatml`, `llama3`, `gemma`, `mistral` or `plain`;
        None for the one whose marks are tokens of the tokenizer.
      overlong: what becomes of a chat or completion that is longer than a row: it is left out,
        cut behind the row, or an error. Each is counted.
      prefetch: batches to read ahead and put on the devices while a step runs; 0 reads each when
        it is requested.
    """

    path: str | None = None
    seq_len: int = 256
    batch_size: int = 8
    seed: int = 0
    validation_fraction: float = 0.05
    overlap: int = 0
    tokenizer: str | None = None
    packing: bool = False
    prefetch: int = 2
    format: Literal["text", "json_lines"] = "text"
    template: str | None = None
    overlong: Literal["drop", "cut", "error"] = "drop"

    def __post_init__(self) -> None:
        """Refuses sizes that no text can satisfy."""
        check_options(self, DataError, "The data cannot be read this way.", "data.")
        checks = {
            f"seq_len={self.seq_len}": (self.seq_len >= 1, "must be at least 1.", "seq_len=256"),
            f"batch_size={self.batch_size}": (
                self.batch_size >= 1,
                "must be at least 1.",
                "batch_size=8",
            ),
            f"validation_fraction={self.validation_fraction:g}": (
                0 < self.validation_fraction < 1,
                "must be a fraction of the files: more than 0, less than 1.",
                "validation_fraction=0.05",
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
            for name, (valid, why, fix) in checks.items()
            if not valid
        ]
        problems += self._format_problems()
        for name in ("path", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (problem := path_problem(value, f"data.{name}={value}")):
                problems.append(problem)
        raise_all(DataError, "The data cannot be cut this way.", problems)

    def _format_problems(self) -> list[Problem]:
        """Lists fields that change nothing for this format."""
        if self.format == "json_lines":
            fields = {"overlap": 0}
            why, fix = "changes nothing: examples are scored whole.", "data.overlap=0"
        else:
            fields = {"template": None, "overlong": "drop"}
            why, fix = "changes nothing: text is no chat.", "data.format=json_lines"
        return [
            Problem(f"data.{name}={getattr(self, name)}", why, f"--set {fix}")
            for name, default in fields.items()
            if getattr(self, name) != default
        ]
