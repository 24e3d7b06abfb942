"""Attention by JAX's splash kernel for TPUs, which skips the blocks that the mask hides.

Dims: B batch, T length, N query heads, K key heads, H head width.

The partitioner cannot split a Pallas kernel, so each device runs it on its own rows and heads.
"""

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from ._overridable import shard_mapped

# Larger tiles do not fit the vector memory of a v5e core in the backward kernels.
_LARGEST_BLOCK = 512
_VECTOR_LANES = 128  # of a TPU's vector unit; block sizes are multiples of it

_BLOCKS = (
    "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq "
    "block_kv_dq"
).split()
_QUERIES = ("batch", "length", "heads", "head_dim")
_KEYS = ("batch", "length", "kv_heads", "head_dim")
_ROWS = ("batch", "length")


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `sk.nn.attention` does, computed by TPU kernels.

    q is [batch, length, heads, head_dim], k and v [batch, length, kv_heads, head_dim], with a
    length that is a multiple of 128; `segment_ids` is i32[batch, length] or None. With `interpret`
    the kernels run step by step on any backend, for tests.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        kernel = _kernel(q.shape[2], q.shape[1], causal, interpret)
        heads_first = [x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
        if not segments:
            return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
        ids = kernels.SegmentIds(segments[0], segments[0])
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    segments = () if segment_ids is None else (segment_ids,)
    names = (_QUERIES, _KEYS, _KEYS, *(_ROWS for _ in segments))
    return shard_mapped(local, names, _QUERIES)(q_BTNH, k_BTKH, v_BTKH, *segments)


def _kernel(heads: int, length: int, causal: bool, interpret: bool) -> Any:
    mask = kernels.CausalMask if causal else kernels.FullMask
    block = next(size for size in (_LARGEST_BLOCK, 256, _VECTOR_LANES) if length % size == 0)
    sizes: Any = dict.fromkeys(_BLOCKS, block)
    # Under the name of the output, so that a policy which keeps one keeps both.
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask((length, length)) for _ in range(heads)]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**sizes),
        residual_checkpoint_name="attn_mix",
        interpret=interpret,
    )
