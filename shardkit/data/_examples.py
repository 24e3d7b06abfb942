"""`Examples`: batches of chats and completions, as functions of (seed, step, row) alone."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._core.errors import DataError, Problem, count, format_problems
from ._chat_template import ChatTemplate, choose_template
from ._config import DataConfig
from ._encoded_examples import (
    EncodedExample,
    ExampleRows,
    encode_examples,
    fit_examples,
    split_examples,
)
from ._json_lines import Example, read_examples
from ._sequences import TokenBatch
from ._shuffled_index import shuffled_index
from ._text import Text, load_text
from ._tokenizer import Tokenizer, load_fitting_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """The beginning of a validation example, to continue."""

    text: str  # what comes before the first answer
    ids: Sequence[int]  # its tokens
    answer: str  # the first answer of the example


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples in rows, of which the answers are predicted; a `TextSource`.

    Attributes:
      config: how they are read and laid out.
      tokenizer: that encoded them.
      template: of the chats; None if there are none.
      train_rows: the examples to train on.
      validation_rows: those to score.
      left_out: examples that were dropped or cut because they are longer than a row.
      held_out: the validation examples as text.
    """

    config: DataConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    train_rows: ExampleRows
    validation_rows: ExampleRows
    left_out: Sequence[EncodedExample] = dataclasses.field(repr=False)
    held_out: Sequence[Example] = dataclasses.field(repr=False)
    unit: str = dataclasses.field(default="token", init=False)
    validation_bytes: None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuses batches of more rows than an epoch has."""
        if self.config.batch_size > self.rows_per_epoch:
            n = self.rows_per_epoch
            why = f"data.batch_size={self.config.batch_size}, but the examples fill {n} rows."
            fix = f"--set data.batch_size={n}, or more examples"
            if self.config.packing:
                fix += ", or --set data.packing=false"
            raise DataError.of("There are too few examples.", str(self.config.path), why, fix)

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        return self.config.batch_size

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return len(self.train_rows.members)

    @property
    def validation_tokens(self) -> int:
        """Number of answer tokens that the validation batches score, each once."""
        return sum(example.answers for example in self.validation_rows.examples)

    @property
    def validation_steps(self) -> int:
        """Number of batches that cover the validation examples."""
        return -(-len(self.validation_rows.members) // self.config.batch_size)

    def describe(self) -> str:
        """Returns one line: counts of examples and tokens, what is left out, and the template."""
        train, validation = (_count(rows) for rows in (self.train_rows, self.validation_rows))
        text = f"{self.config.path}: {train}; validation: {validation}"
        if self.left_out:
            rows = (self.train_rows, self.validation_rows)
            used = {example.where for each in rows for example in each.examples}
            lost = sum(example.where not in used for example in self.left_out)
            what = "dropped"
            if lost < len(self.left_out):
                what = f"cut, {lost} dropped whose answer begins behind it" if lost else "cut"
            long = count(len(self.left_out), "example")
            text += f"; {long} longer than a row {what} (first: {self.left_out[0].where})"
        fill = f"; rows {self.train_rows.fill:.0%} full"
        return text + fill + (f"; template {self.template.name}" if self.template else "")

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> TokenBatch:
        """Returns the training batch of a step, or some of its rows; see `ExampleRows.make`."""
        n, seed = self.config.batch_size, self.config.seed
        numbers = np.arange(step * n, (step + 1) * n)[rows]
        picked = shuffled_index(seed, numbers, self.rows_per_epoch)
        return self.train_rows.make([row for row, _ in picked])

    def validation_batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> TokenBatch:
        """Returns the validation batch of a step in `range(validation_steps)`."""
        n = self.config.batch_size
        return self.validation_rows.make(np.arange(step * n, (step + 1) * n)[rows].tolist())

    def validation_weight(self, step: int) -> int:
        """Number of tokens that all rows of a validation batch score."""
        return int(self.validation_batch(step)["weights"].sum())

    def prompts(self, n: int) -> list[Prompt]:
        """Returns the beginnings of the first validation examples that have one."""
        found = list[Prompt]()
        for example in self.held_out:
            at = next(i for i, turn in enumerate(example.turns) if turn.is_answer)
            before = example.turns[:at]
            if not before or len(found) == n:
                continue
            text, chat = before[0].content, example.is_chat
            if chat and self.template is not None:
                text = self.template.render_prompt(before)
            [(ids, _)] = self.tokenizer.encode_spans([text], start=not chat)
            if 0 < len(ids):
                found.append(Prompt(text, ids.tolist(), example.turns[at].content))
        return found

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids behind which an answer ends."""
        ends = {self.tokenizer.end}
        if self.template is not None:
            ends.add(self.tokenizer.tokens.get(self.template.end))
        return tuple(sorted(end for end in ends if end is not None))

    def state(self, step: int) -> dict[str, Any]:
        """Returns the step, with how the examples are laid out and a checksum of them."""
        config = self.config
        settings = {"rows": config.batch_size, "length": config.seq_len, "packing": config.packing}
        settings |= {"rows_per_epoch": self.rows_per_epoch, "seed": config.seed}
        template = self.template and self.template.name
        return {
            "batch": step,
            **settings,
            "tokens": self.tokenizer.name,
            "template": template,
            "overlong": config.overlong,
            "crc32": self._checksum,
        }

    def __str__(self) -> str:
        return f"the examples in {self.config.path}"

    @functools.cached_property
    def _checksum(self) -> str:
        crc = 0
        for example in (*self.train_rows.examples, *self.validation_rows.examples):
            crc = zlib.crc32(example.ids.tobytes() + example.counts.tobytes(), crc)
        return f"{crc:08x}"


def _count(rows: ExampleRows) -> str:
    examples = len(rows.examples)
    tokens = sum(len(example.ids) for example in rows.examples)
    answers = sum(example.answers for example in rows.examples)
    return f"{count(examples, 'example')}, {tokens:,} tokens, {answers:,} of answers"


def load_source(config: DataConfig, vocabulary: int | None = None) -> Text | Examples:
    """Reads what a config names: examples with `format="json_lines"`, else text or token shards.

    Raises:
      DataError: as `load_examples` and `load_text` raise it.
    """
    load = load_examples if config.format == "json_lines" else load_text
    return load(config, vocabulary)


def load_examples(config: DataConfig, vocabulary: int | None = None) -> Examples:
    """Reads, encodes and lays out the examples of a config with `format="json_lines"`.

    Args:
      config: what to read.
      vocabulary: number of ids of the model; None for as many as the tokenizer has.

    Raises:
      DataError: the examples, the tokenizer or the template cannot be used; names file and line.
    """
    headline = "The examples cannot be encoded."
    if config.path is None:
        why = "is not set"
        raise DataError.of("There are no examples.", "data.path", why, "--set data.path=FILE.jsonl")
    if config.tokenizer is None:
        fix = "--set data.tokenizer=tokenizer.json, or --set data.tokenizer=bytes"
        why = "is not set, and there is none beside weights"
        raise DataError.of(headline, "data.tokenizer", why, fix)
    examples = read_examples(config.path)
    tokenizer = load_fitting_tokenizer(config, vocabulary)
    template = None
    if any(example.is_chat for example in examples):
        template = choose_template(config.template, tokenizer.tokens)
    elif config.template is not None:
        problem = Problem(f"data.template={config.template}", "changes nothing: there is no chat")
        raise DataError(format_problems(headline, [problem], "--set data.template=none"))
    encoded = encode_examples(examples, tokenizer, template)
    is_text = [example.is_text for example in examples]
    fitting, left_out = fit_examples(encoded, is_text, config.seq_len, config.overlong)
    usable = {example.where for example in fitting}
    kept = [example for example in examples if example.where in usable]
    held_out = split_examples(kept, config.validation_fraction)[1]
    scored = {example.where for example in held_out}
    parts: tuple[list[EncodedExample], list[EncodedExample]] = ([], [])
    for example in fitting:
        parts[example.where in scored].append(example)
    train, validation = (ExampleRows(part, config.seq_len, config.packing) for part in parts)
    return Examples(
        config,
        tokenizer,
        template,
        train_rows=train,
        validation_rows=validation,
        left_out=left_out,
        held_out=held_out,
    )
