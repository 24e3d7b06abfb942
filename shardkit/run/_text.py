"""Text as a run reads it: its batches, its position, and the score on what is held out."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..data import Batch, Text
from ._loop import Step


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Batches of a text as the source of a run."""

    text: Text

    def batches(self, start: int) -> Iterator[Batch]:
        """Yields batch after batch, epoch after epoch."""
        return map(self.text.batch, itertools.count(start))

    def position(self, step: int) -> dict[str, Any]:
        """Says where in the text a run is: batches are functions of the step, so the step does.

        The rest recognizes the text: the same step of other bytes would be other data.
        """
        return {
            "batch": step,
            "rows_per_epoch": self.text.rows_per_epoch,
            "crc32": f"{zlib.crc32(self.text.corpus.train):08x}",
        }

    def __str__(self) -> str:
        """Names the text."""
        return self.text.corpus.source


def describe_text(values: Mapping[str, float]) -> str:
    """Says what an update's or an evaluation's metrics are, in bits.

    >>> describe_text({"loss": 5.482}), describe_text({"bits_per_byte": 3.084, "bytes": 8192})
    ('loss 5.482  7.909 bits/byte', '3.084 bits/byte on 8,192 held-out bytes')
    """
    if "bits_per_byte" in values:
        return f"{values['bits_per_byte']:.3f} bits/byte on {values['bytes']:,.0f} held-out bytes"
    return f"loss {values['loss']:.3f}  {values['loss'] / math.log(2):.3f} bits/byte"


def held_out_bits(step: Step, state: Any, text: Text, steps: Iterable[int]) -> tuple[float, int]:
    """Scores held-out batches.

    Each batch's loss is a mean over its own valid bytes; weighing it by their number makes the
    result the mean over all of them.

    Returns:
      Bits per byte, and the number of bytes scored.
    """
    scores: list[tuple[Any, int]] = []
    for i in steps:
        batch: Batch = text.held_out_batch(i)
        loss = step.evaluate(state, step.put(batch))["loss"]
        scores.append((loss, int(batch["weights"].sum())))
        if len(scores) > 1:
            float(scores[-2][0])  # one batch in flight, not the whole text
    scored = sum(weight for _, weight in scores)
    nats = sum(float(loss) * weight for loss, weight in scores) / scored
    return nats / math.log(2), scored


def spread(text: Text, count: int) -> list[int]:
    """Picks at most `count` held-out batches, evenly over all of them.

    They never hold the whole text, so what they say is for the way, not for the result.
    """
    batches = text.held_out_steps
    return [i * batches // min(count, batches) for i in range(min(count, batches))]
