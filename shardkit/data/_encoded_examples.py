"""Examples as tokens: which count in the loss, which are too long, and how rows hold them."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from .._core.errors import DataError, Problem, count
from ._chat_template import ChatTemplate, Spans
from ._json_lines import Example, raise_some
from ._sequences import TokenBatch, fill_rows, pack_best_fit
from ._tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedExample:
    """The tokens of an example, or of a part of it."""

    where: str  # `file:line`
    ids: np.ndarray  # u32[n]
    counts: np.ndarray  # bool[n], whether a token counts in the loss when it is predicted

    @property
    def size(self) -> int:
        """Positions that it takes in a row: one less than it has tokens."""
        return len(self.ids) - 1

    @property
    def answers(self) -> int:
        """Number of tokens that are predicted and count."""
        return int(self.counts[1:].sum())

    def cut(self, start: int, size: int) -> "EncodedExample":
        """Returns the part that takes `size` positions from `start` on."""
        part = slice(start, start + size + 1)
        return EncodedExample(self.where, self.ids[part], self.counts[part])


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[EncodedExample]:
    """Encodes every example whole, so that its tokens are those of its text.

    A token that holds a character of an answer counts, also where it begins in front of it. Behind
    texts and completions, and behind chats in a template without marks, comes the tokenizer's end.
    Raises DataError with every chat that the template cannot write, and every example that has no
    token to predict.
    """
    written, problems = list[tuple[str, Spans]](), list[Problem]()
    for example in examples:
        try:
            written.append(_write(example, template))
        except ValueError as error:
            problems.append(Problem(example.where, str(error)))
    raise_some("The chats do not fit their template.", problems, "--set data.template=OTHER")
    marked = template is not None and template.end in tokenizer.tokens
    encoded = dict[int, EncodedExample]()
    for is_chat in (False, True):  # a template writes the start of a document itself
        texts = {i: written[i][0] for i, e in enumerate(examples) if e.is_chat is is_chat}
        ends = tokenizer.end is not None and not (is_chat and marked)
        pairs = tokenizer.encode_spans(list(texts.values()), start=not is_chat)
        for i, (ids, spans) in zip(texts, pairs, strict=True):
            counts = np.zeros(len(ids), bool)
            for first, last in written[i][1]:
                counts |= (spans[:, 0] < last) & (spans[:, 1] > first)
            if ends and ids[-1:] != [tokenizer.end]:
                ids = np.append(ids, np.uint32(tokenizer.end or 0))
                counts = np.append(counts, True)
            encoded[i] = EncodedExample(examples[i].where, ids, counts)
    problems = [
        Problem(example.where, "has no token of an answer to predict")
        for example in encoded.values()
        if not example.answers
    ]
    raise_some("Examples have nothing to learn.", problems, "a longer answer")
    return [encoded[i] for i in range(len(examples))]


def _write(example: Example, template: ChatTemplate | None) -> tuple[str, Spans]:
    if example.is_chat and template is not None:
        return template.render(example.turns)
    text, spans = "", list[tuple[int, int]]()
    for turn in example.turns:
        if turn.is_answer:
            spans.append((len(text), len(text) + len(turn.content)))
        text += turn.content
    return text, spans


def fit_examples(
    encoded: Sequence[EncodedExample], is_text: Sequence[bool], length: int, overlong: str
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """Returns the examples that fit into rows, and those of which something is left out.

    Text is cut into parts, so that each of its tokens is predicted once. Raises DataError if one is
    longer than a row and `overlong` is `error`, or none is left.
    """
    fitting, changed = list[EncodedExample](), list[EncodedExample]()
    for example, text in zip(encoded, is_text, strict=True):
        if example.size <= length:
            fitting.append(example)
        elif text:
            parts = (example.cut(at, length) for at in range(0, example.size, length))
            fitting += parts
        else:
            changed.append(example)
            part = example.cut(0, length)
            fitting += [part] if overlong == "cut" and part.answers else []
    longest = max((example.size for example in changed), default=0)
    fix = f"--set data.seq_len={longest}, or --set data.overlong=drop or cut"
    if overlong == "error":
        problems = [
            Problem(example.where, f"has {len(example.ids):,} tokens; a row has {length:,} + 1")
            for example in changed
        ]
        raise_some("Examples are longer than a row.", problems, fix)
    if not fitting:
        why = f"has {len(changed[0].ids):,} tokens; a row has {length:,} + 1, and none fits"
        raise DataError.of("Every example is longer than a row.", changed[0].where, why, fix)
    return fitting, changed


def split_examples(
    examples: Sequence[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
    """Splits off the validation examples: those with the lowest hashes of their words.

    Neither their order nor a seed moves one, and equal ones are on one side. Raises DataError if
    all are equal, or there is one.
    """
    hashes = [hashlib.sha256(repr(e.turns).encode("utf-8", "replace")).digest() for e in examples]
    last = sorted(hashes)[max(1, round(fraction * len(hashes))) - 1]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, digest in zip(examples, hashes, strict=True):
        parts[digest <= last].append(example)
    if not parts[0]:
        why = f"is one of {count(len(examples), 'example')} that are all for validation"
        fix = "two different examples at least"
        raise DataError.of("No example is left to train on.", examples[0].where, why, fix)
    return parts


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleRows:
    """Examples laid out in rows: one in each, or several side by side."""

    examples: Sequence[EncodedExample]  # each at most `length` positions long
    length: int  # positions of a row
    packing: bool  # whether a row holds several

    @functools.cached_property
    def members(self) -> list[list[int]]:
        """Numbers of the examples in each row."""
        if not self.packing:
            return [[number] for number in range(len(self.examples))]
        sizes = np.array([example.size for example in self.examples])
        rows = pack_best_fit(sizes, self.length)
        members: list[list[int]] = [[] for _ in range(int(rows.max()) + 1)]
        for number, row in enumerate(rows.tolist()):
            members[row].append(number)
        return members

    @property
    def fill(self) -> float:
        """Fraction of the positions that hold a token, not padding."""
        return sum(e.size for e in self.examples) / (len(self.members) * self.length)

    def make(self, rows: Sequence[int]) -> TokenBatch:
        """Returns the rows of these numbers; a number behind the last is a row of padding.

        Weights are 1 where an answer is predicted; for the other arrays see `fill_rows`.
        """
        members = (self.members[row] if row < len(self.members) else () for row in rows)
        examples = [[self.examples[number] for number in row] for row in members]
        return fill_rows([[(e.ids, e.counts[1:]) for e in row] for row in examples], self.length)
