"""`Generator`: continues prompts with a cache of keys and values, on the mesh of the parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.options import check_arguments
from .._core.types import Key, Params
from ..parallel import Strategy
from ..rules import AxisRules
from ..step._activations import Activations
from ..step._inputs import put_key
from ..step._program_cache import load_or_compile
from ._cache import extend_cache, fill_cache
from ._declare import decoder_model
from ._decoder_config import DecoderConfig

# Prompts are padded to a multiple, so that prompts of similar lengths are one program.
_MULTIPLE = 32
_HEADLINE = "The prompts cannot be continued."
# Compiled programs that are kept, those that were used last.
_KEPT = 8
# A row has one token at a time, which no axis splits along the length.
_WHOLE = ("length", "residual_length")


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Samples what a decoder writes behind prompts; compiled once for a length.

    The prompts are computed at once, then one token of each per pass. Keys and values of all
    positions stay on the devices, split like the heads and the rows of a training step. A row has
    the same tokens whatever the mesh and the other rows.

        generator = Generator(config, mesh, strategy)
        answers = generator(state.params, prompts, count=100, stop=(end,))

    Attributes:
      config: of the decoder. With `capacity_factor` a full forward pass may drop tokens that a
        cached one does not.
      mesh: the devices.
      strategy: that of the training step; its activations lay out rows and heads.
    """

    config: DecoderConfig
    mesh: Mesh
    strategy: Strategy
    _programs: dict[tuple[Any, ...], Callable[..., jax.Array]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        temperature: float = 0.0,
        key: Key | None = None,
        stop: Sequence[int] = (),
    ) -> list[np.ndarray]:
        """Samples tokens.

        Args:
          params: of the decoder, in any sharding on the mesh; of adapters `lora.merge(params)`.
          prompts: token ids of each, at least one.
          count: the most tokens of a sample.
          temperature: logits are divided by it; 0 takes the likeliest token.
          key: typed PRNG key, with a temperature.
          stop: ids that end a sample.

        Returns:
          For each prompt i32[n], the tokens behind it; n is `count`, or the last is in `stop`.

        Raises:
          StepError: a prompt is empty or has ids that the decoder lacks; prompt and sample are
            longer than a learned table of positions; or a temperature has no key.
        """
        self._check(prompts, count, temperature, key)
        length = max(map(len, prompts))
        rows = -(-len(prompts) // self._row_shards) * self._row_shards
        limit = math.inf if self.config.positions is None else self.config.positions - count
        width = int(min(-(-length // _MULTIPLE) * _MULTIPLE, limit))
        tokens, last = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], last[row] = prompt, len(prompt) - 1
        replicated = NamedSharding(self.mesh, PartitionSpec())
        numbers = (tokens, last, np.int32(len(prompts)), np.float32(temperature))
        shared = put_key(jax.random.key(0) if key is None else key, replicated)
        given = (shared, *jax.device_put(numbers, replicated))
        drawn = np.asarray(self._program(params, given, count, tuple(stop))(params, *given))
        ends = [np.flatnonzero(np.isin(row, stop)) for row in drawn]
        pairs = zip(drawn[: len(prompts)], ends, strict=False)
        return [row[: end[0] + 1] if len(end) else row for row, end in pairs]

    @property
    def _row_shards(self) -> int:
        axes = self._rules.mesh_axes("batch") if self._rules else ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @functools.cached_property
    def _rules(self) -> AxisRules | None:
        rules = self.strategy.activations
        if rules is None:
            return None
        return AxisRules({name: None if name in _WHOLE else axes for name, axes in rules.table})

    @functools.cached_property
    def _bind(self) -> Callable[[Params], Any]:
        # The other implementations need lengths or devices of their own.
        known = self.config.attention in ("blocked", "xla")
        attention = self.config.attention if known else "auto"
        return decoder_model(dataclasses.replace(self.config, attention=attention)).bind

    def _program(
        self, params: Params, given: Any, count: int, stop: tuple[int, ...]
    ) -> Callable[..., jax.Array]:
        bind = self._bind  # made here: under a mesh flax takes logical names for its axes
        layout = [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves((params, given))]
        shapes = (*layout, count, stop)
        program = self._programs.pop(shapes, None)  # the least recently used is first
        if program is None:
            names = Activations(self.mesh, self._rules, ())
            run = functools.partial(_generate, bind, self.config.vocab, count, stop)
            with names.around_loss():
                replicated = NamedSharding(self.mesh, PartitionSpec())
                traced = jax.jit(run, out_shardings=replicated).trace(params, *given)
                names.check(traced.jaxpr)
                program = load_or_compile(traced.lower(), self.mesh)
        self._programs[shapes] = program
        if len(self._programs) > _KEPT:
            del self._programs[next(iter(self._programs))]
        return program

    def _check(self, prompts: Any, count: Any, temperature: Any, key: Any) -> None:
        options = {"count": (count, int), "temperature": (temperature, float)}
        check_arguments(StepError, _HEADLINE, prompts=(prompts, Sequence[Any]), **options)
        problems = [] if len(prompts) else [Problem("prompts", "are none", "prompts=[[1]]")]
        vocabulary, positions = self.config.vocab, self.config.positions
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                problems.append(Problem(f"prompts[{row}]", "is empty", "at least one token"))
            elif min(prompt) < 0 or max(prompt) >= vocabulary:
                why = f"has ids that are not in 0 to {vocabulary - 1}"
                problems.append(Problem(f"prompts[{row}]", why, "the tokenizer of the model"))
            elif positions is not None and len(prompt) + count > positions:
                why = f"has {len(prompt)} tokens, and with count={count} more than the "
                why += f"{positions} positions that the model has"
                problems.append(Problem(f"prompts[{row}]", why, "a shorter prompt or count"))
        if count < 1:
            problems.append(Problem(f"count={count}", "must be at least 1", "count=100"))
        if temperature < 0:
            problems.append(Problem(f"temperature={temperature}", "is negative", "temperature=0.7"))
        if temperature > 0 and key is None:
            fix = "key=jax.random.key(0), or temperature=0.0"
            problems.append(Problem("key", f"is missing: temperature={temperature}", fix))
        raise_all(StepError, _HEADLINE, problems)


def _generate(
    bind: Callable[[Params], Any],
    vocabulary: int,
    count: int,
    stop: tuple[int, ...],
    params: Params,
    key: Key,
    tokens_BT: jax.Array,
    last_B: jax.Array,
    prompts: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Returns i32[rows, count]; what is behind the end of a sample means nothing."""
    model, (rows, length) = bind(params), tokens_BT.shape
    logits, cache = fill_cache(model, tokens_BT, last_B, length + count)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    carry = (jnp.int32(0), logits, cache, jnp.arange(rows) >= prompts)

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        scaled = logits[:, :vocabulary] / jnp.maximum(temperature, 1e-6)
        random = jax.vmap(jax.random.categorical)(own, scaled)
        return jnp.where(temperature > 0, random, scaled.argmax(-1)).astype(jnp.int32)

    def append(carry: Any) -> Any:
        (i, logits, cache, done), drawn = carry
        token = draw(logits, i)
        drawn = drawn.at[:, i].set(token)
        done = done | jnp.isin(token, jnp.array(stop, jnp.int32))
        logits, cache = extend_cache(model, token, last_B + 1 + i, cache)
        return (i + 1, logits, cache, done), drawn

    def is_open(carry: Any) -> jax.Array:
        (i, _, _, done), _ = carry
        return (i < count) & ~done.all()

    return jax.lax.while_loop(is_open, append, (carry, jnp.zeros((rows, count), jnp.int32)))[1]
