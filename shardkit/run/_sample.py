"""Text from a trained byte model, one byte after another, in one compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Logits f32[vocab] of the byte behind position `at` of a row i32[1, length].
NextByte = Callable[[Any, jax.Array, jax.Array], jax.Array]


def sample_bytes(
    next_byte: NextByte,
    params: Any,
    count: int,
    window: int,
    temperature: float,
    key: jax.Array,
    prompt: bytes = b"\0",
) -> bytes:
    """Draws bytes that follow a prompt.

    The model always sees a row of one fixed length, so everything compiles once. What lies behind
    the last byte is hidden by the causal mask; once the row is full it moves on by one byte.

    Args:
      next_byte: `(params, row, at) -> logits`.
      params: pytree of arrays, on the devices that are to compute.
      count: bytes to draw.
      window: length of the row.
      temperature: logits are divided by it.
      key: typed PRNG key.
      prompt: at least one byte; the last `window` of them count.

    Returns:
      The drawn bytes, without the prompt.
    """
    start = np.zeros(window, np.int32)
    tail = np.frombuffer(prompt[-window:], np.uint8)
    start[: len(tail)] = tail

    def draw(params: Any, row: jax.Array) -> jax.Array:
        def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, drawn = carry
            at = jnp.minimum(len(tail) - 1 + i, window - 1)
            logits = next_byte(params, row[None], at)[:256]
            byte = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
            byte = byte.astype(jnp.int32)
            row = jnp.where(at == window - 1, jnp.roll(row, -1), row)
            place = jnp.minimum(at + 1, window - 1)
            return row.at[place].set(byte), drawn.at[i].set(byte)

        return jax.lax.fori_loop(0, count, one, (row, jnp.zeros(count, jnp.int32)))[1]

    drawn = jax.jit(draw)(params, start)
    return bytes(np.asarray(drawn, np.uint8))


def printable(text: bytes) -> str:
    r"""Returns text that is safe to print: what is not becomes `\xNN`, zero bytes end a file.

    >>> print(printable(b"a = 1\x1b\0c"))
    a = 1\x1b
    --- end of file ---
    c
    """
    decoded = text.replace(b"\0", b"\n--- end of file ---\n").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in decoded)
