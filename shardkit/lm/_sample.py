"""Tokens from a trained model, one after another, in one compiled loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Logits f32[vocab] of the token behind position `at` of a row i32[1, length].
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
    """Draws tokens that follow a prompt.

    The model always sees a row of one fixed length, so everything compiles once. What lies behind
    the last token is hidden by the causal mask; once the row is full it moves on by one token.

    Args:
      next_token: `(params, row, at) -> logits`.
      params: pytree of arrays, on the devices that are to compute.
      prompt: at least one token; the last `window` of them count.
      count: tokens to draw.
      window: length of the row.
      vocabulary: ids that may be drawn; a model may have more than there are tokens.
      temperature: logits are divided by it.
      key: typed PRNG key.

    Returns:
      The drawn tokens i32[count], without the prompt.
    """
    start = np.zeros(window, np.int32)
    tail = prompt[-window:]
    start[: len(tail)] = list(tail)

    def draw(params: Any, row: jax.Array) -> jax.Array:
        def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, drawn = carry
            at = jnp.minimum(len(tail) - 1 + i, window - 1)
            logits = next_token(params, row[None], at)[:vocabulary]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
            token = token.astype(jnp.int32)
            row = jnp.where(at == window - 1, jnp.roll(row, -1), row)
            place = jnp.minimum(at + 1, window - 1)
            return row.at[place].set(token), drawn.at[i].set(token)

        return jax.lax.fori_loop(0, count, one, (row, jnp.zeros(count, jnp.int32)))[1]

    return np.asarray(jax.jit(draw)(params, start))


def printable(text: bytes) -> str:
    r"""Returns text that is safe to print: what is not becomes `\xNN`, zero bytes end a file.

    >>> print(printable(b"a = 1\x1b\0c"))
    a = 1\x1b
    --- end of file ---
    c
    """
    decoded = text.replace(b"\0", b"\n--- end of file ---\n").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in decoded)
