"""`TextScores`: bits per token and per byte of a model on validation text."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..data import ScoredSource
from ..step import CompiledStep


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Score of a model on validation text."""

    unit: str  # what a token is: `byte` or `token`
    bits: float  # mean bits per token
    scored: int  # number of tokens
    bytes_per_token: float | None  # mean bytes of a validation token; None if only tokens are known

    @classmethod
    def of(
        cls, step: CompiledStep, state: Any, text: ScoredSource, batches: Iterable[int]
    ) -> "TextScores":
        """Scores the validation batches of these numbers."""
        size = text.validation_bytes
        bytes_per_token = None if size is None else size / text.validation_tokens
        bits, scored = measure_bits_per_token(step, state, text, batches)
        return cls(text.unit, bits, scored, bytes_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None if only tokens are known."""
        return None if self.bytes_per_token is None else self.bits / self.bytes_per_token

    @property
    def shown(self) -> tuple[str, float]:
        """The unit to show, bytes if they are known, and the bits per unit."""
        per_byte = self.bits_per_byte
        return (self.unit, self.bits) if per_byte is None else ("byte", per_byte)

    @property
    def metrics(self) -> dict[str, float]:
        """Columns of an `eval` row of the metrics.

        >>> TextScores("byte", 2.5, 100, 1.0).metrics
        {'bits_per_byte': 2.5, 'bytes': 100}
        >>> TextScores("token", 9.0, 100, 4.5).metrics
        {'bits_per_byte': 2.0, 'bits_per_token': 9.0, 'tokens': 100}
        """
        per_byte = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return per_byte | {f"bits_per_{self.unit}": self.bits, f"{self.unit}s": self.scored}


def describe_text_metrics(values: Mapping[str, float], unit: str = "byte") -> str:
    """Formats the metrics of an update or an evaluation, in bits.

    >>> describe_text_metrics({"loss": 5.482})
    'loss 5.482  7.909 bits/byte'
    >>> describe_text_metrics({"bits_per_byte": 3.084, "bytes": 8192})
    '3.084 bits/byte on 8,192 validation bytes'
    >>> describe_text_metrics({"bits_per_token": 9.5, "tokens": 100}, "token")
    '9.500 bits/token on 100 validation tokens'
    """
    if f"bits_per_{unit}" in values:
        bits, scored = values[f"bits_per_{unit}"], values[f"{unit}s"]
        return f"{bits:.3f} bits/{unit} on {scored:,.0f} validation {unit}s"
    return f"loss {values['loss']:.3f}  {values['loss'] / math.log(2):.3f} bits/{unit}"


def measure_bits_per_token(
    step: CompiledStep, state: Any, text: ScoredSource, batches: Iterable[int]
) -> tuple[float, int]:
    """Evaluates the validation batches of these numbers: bits per token, and the number of tokens.

    The loss of a batch is a mean over its valid tokens. Weighted by their number, the mean over
    batches is the mean over all tokens.
    """
    scores: list[tuple[Any, int]] = []
    for i in batches:
        loss = step.evaluate(state, step.shard_batch(text.validation_batch(i, step.local_rows)))[
            "loss"
        ]
        scores.append((loss, text.validation_weight(i)))
        if len(scores) > 1:
            float(scores[-2][0])  # wait, so that one batch is in flight and not the whole text
    scored = sum(weight for _, weight in scores)
    nats = sum(float(loss) * weight for loss, weight in scores) / scored
    return nats / math.log(2), scored


def spread_batches(text: ScoredSource, count: int) -> list[int]:
    """Returns the numbers of at most `count` validation batches, evenly over all of them.

    Too few to rank models by; they show progress during training.
    """
    batches = text.validation_steps
    return [i * batches // min(count, batches) for i in range(min(count, batches))]
