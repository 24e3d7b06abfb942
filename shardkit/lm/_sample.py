"""Samples tokens from a trained model in one compiled loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# `(params, row i32[1, length], at i32[]) -> f32[vocab]`: logits of the token after position `at`.
NextToken = Callable[[Any, jax.Array, jax.Array], jax.Array]


def sample_tokens(
    next_token: NextToken,
    params: Any,
    prompt: Sequence[int],
    *,
    count: int,
    window: int,
    vocabulary: int,
    temperature: float,
    key: jax.Array,
) -> np.ndarray:
    """Samples the tokens that follow a prompt.

    The model always sees a row of `window` tokens, so everything compiles once. The causal mask
    hides what is behind the last token. A full row is shifted by one. For `window=4`:

        a b 0 0  → c      at=1: read the logits after b, write c behind it
        a b c 0  → d      at=2
        a b c d  → e      at=3: full, so the next row is b c d e

    Args:
      next_token: `(params, row, at) -> logits`.
      params: pytree of arrays, on the devices that compute.
      prompt: at least one token; only the last `window` are used.
      count: number of tokens to sample.
      window: length of the row.
      vocabulary: number of ids to sample from; the logits of a model may have more.
      temperature: logits are divided by it.
      key: typed PRNG key.

    Returns:
      i32[count], the sampled tokens without the prompt.
    """
    start = np.zeros(window, np.int32)
    tail = prompt[-window:]
    start[: len(tail)] = list(tail)

    def draw(params: Any, row: jax.Array) -> jax.Array:
        def append(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, tokens = carry
            at = jnp.minimum(len(tail) - 1 + i, window - 1)
            logits = next_token(params, row[None], at)[:vocabulary]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
            token = token.astype(jnp.int32)
            row = jnp.where(at == window - 1, jnp.roll(row, -1), row)
            place = jnp.minimum(at + 1, window - 1)
            return row.at[place].set(token), tokens.at[i].set(token)

        return jax.lax.fori_loop(0, count, append, (row, jnp.zeros(count, jnp.int32)))[1]

    return np.asarray(jax.jit(draw)(params, start))


def printable(text: bytes) -> str:
    r"""Returns text that is safe to print: bytes that are not become `\xNN`, and zero a line.

    >>> print(printable(b"a = 1\x1b\0c"))
    a = 1\x1b
    --- end of file ---
    c
    """
    decoded = text.replace(b"\0", b"\n--- end of file ---\n").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in decoded)
