"""Text as a run is scored on it: bits per token of what is held out."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..data import Text
from ._loop import Step


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model is worth on held-out text.

    Attributes:
      unit: what a token is: `byte` or `token`.
      bits: bits per token.
      scored: tokens.
      bytes_each: mean bytes of a held-out token; None where only tokens are known.
    """

    unit: str
    bits: float
    scored: int
    bytes_each: float | None

    @classmethod
    def of(cls, step: Step, state: Any, text: Text, steps: Iterable[int]) -> "Scores":
        """Scores held-out batches."""
        size = text.held_out_bytes
        each = None if size is None else size / text.held_out_tokens
        return cls(text.unit, *held_out_bits(step, state, text, steps), each)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable over tokenizers; None where only tokens are known."""
        return None if self.bytes_each is None else self.bits / self.bytes_each

    @property
    def shown(self) -> tuple[str, float]:
        """A unit and the bits per one: bytes, if they are known."""
        known = self.bits_per_byte
        return (self.unit, self.bits) if known is None else ("byte", known)

    @property
    def metrics(self) -> dict[str, float]:
        """As a row of metrics has them.

        >>> Scores("byte", 2.5, 100, 1.0).metrics
        {'bits_per_byte': 2.5, 'bytes': 100}
        >>> Scores("token", 9.0, 100, 4.5).metrics
        {'bits_per_byte': 2.0, 'bits_per_token': 9.0, 'tokens': 100}
        """
        known = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return known | {f"bits_per_{self.unit}": self.bits, f"{self.unit}s": self.scored}


def describe_text(values: Mapping[str, float], unit: str = "byte") -> str:
    """Says what an update's or an evaluation's metrics are, in bits.

    >>> describe_text({"loss": 5.482}), describe_text({"bits_per_byte": 3.084, "bytes": 8192})
    ('loss 5.482  7.909 bits/byte', '3.084 bits/byte on 8,192 held-out bytes')
    >>> describe_text({"bits_per_token": 9.5, "tokens": 100}, "token")
    '9.500 bits/token on 100 held-out tokens'
    """
    if f"bits_per_{unit}" in values:
        bits, scored = values[f"bits_per_{unit}"], values[f"{unit}s"]
        return f"{bits:.3f} bits/{unit} on {scored:,.0f} held-out {unit}s"
    return f"loss {values['loss']:.3f}  {values['loss'] / math.log(2):.3f} bits/{unit}"


def held_out_bits(step: Step, state: Any, text: Text, steps: Iterable[int]) -> tuple[float, int]:
    """Scores held-out batches.

    Each batch's loss is a mean over its own valid tokens; weighing it by their number makes the
    result the mean over all of them.

    Returns:
      Bits per token, and the number of tokens scored.
    """
    scores: list[tuple[Any, int]] = []
    for i in steps:
        loss = step.evaluate(state, step.put(text.held_out_batch(i, step.rows)))["loss"]
        scores.append((loss, text.held_out_weight(i)))
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
