"""What a trained model writes at the end of a run: text, or answers to validation prompts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._core.types import Params
from ..data import Examples, ScoredSource, Text
from ..parallel import Strategy
from ..step import CompiledStep
from ._declare import decoder_model
from ._generate import Generator
from ._sample import sample_tokens
from ._tuning import Tuning

_PROMPTS = 2  # one is an anecdote, and many are not read


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples from the last state of a run."""

    tuning: Tuning  # the model, its adapters, and how long a sample is
    source: ScoredSource  # with the tokenizer, and the prompts of examples
    strategy: Strategy  # that of the step

    def draw(self, step: CompiledStep, params: Params) -> bytes:
        """Returns what the model writes; b"" without tokenizer or prompts, or if none is asked."""
        if not self.tuning.loop.sample:
            return b""
        params = self.tuning.merge(params)
        if isinstance(self.source, Examples):
            return self._answer(self.source, step, params)
        assert isinstance(self.source, Text), "a run reads text or examples"
        return self._continue(self.source, params)

    @property
    def _key(self) -> jax.Array:
        loop = self.tuning.loop
        return jax.random.fold_in(jax.random.key(loop.seed), loop.steps)

    def _answer(self, examples: Examples, step: CompiledStep, params: Params) -> bytes:
        """Returns the beginnings of validation examples, each with an answer."""
        config, loop = self.tuning.model, self.tuning.loop
        room = config.positions and config.positions - loop.sample
        prompts = [
            prompt
            for prompt in examples.prompts(_PROMPTS)
            if room is None or len(prompt.ids) <= room
        ]
        if not prompts:
            return b""
        answers = Generator(config, step.mesh, self.strategy)(
            params,
            [prompt.ids for prompt in prompts],
            count=loop.sample,
            temperature=loop.temperature,
            key=self._key,
            stop=examples.stop,
        )
        decode = examples.tokenizer.decode
        pairs = zip(prompts, map(decode, answers), strict=True)
        return b"\n\n".join(prompt.text.encode() + answer for prompt, answer in pairs)

    def _continue(self, text: Text, params: Params) -> bytes:
        """Returns what the model writes after an end of document."""
        if text.tokenizer is None:
            return b""
        tokens = sample_tokens(
            functools.partial(_predict, decoder_model(self.tuning.model).bind),
            params,
            [text.train.end or 0],
            count=self.tuning.loop.sample,
            window=text.config.seq_len,
            vocabulary=text.tokenizer.vocabulary,
            temperature=self.tuning.loop.temperature,
            key=self._key,
        )
        return text.tokenizer.decode(np.asarray(tokens))


def _predict(
    bind: Callable[[Params], Any], params: Params, row: jax.Array, at: jax.Array
) -> jax.Array:
    """Returns logits of the token behind position `at` of a row, f32[vocab]."""
    model = bind(params)
    return model.logits(model(row)[0, at])
