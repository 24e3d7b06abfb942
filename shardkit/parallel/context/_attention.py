"""The override of `sk.nn.attention` over a length that a mesh axis splits, with its gradient."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ..._core.errors import Problem, ShardingError, raise_all
from ..._core.scope_markers import RING_BLOCKS
from ..._core.tracing import record_fact
from ..._core.tree import short_type
from ...nn._blockwise import BlockOptions
from ...nn._overridable import Override, StepContext, manual_axes
from ...rules import axes_of, format_mesh
from ._attention_layout import AttentionLayout, Hidden
from ._blockwise import Cotangents, Gradients, Keys, Partial, Queries, attend, attend_backward
from ._pairwise import PairwiseExchange
from ._ring import RingAttention


@final
class UlyssesAttention(AttentionLayout):
    """Exchanges length for heads, attends to whole rows, and exchanges back (arXiv:2309.14509)."""

    def compute_spec(self, ndim: int) -> PartitionSpec:
        """Lengths are whole; heads are split over the axis as well."""
        return PartitionSpec(*(self.row_axes or None, None, (*self.head_axes, self.axis))[:ndim])

    def move_to_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """Sends every other device its heads; segments, which have no heads, are gathered."""
        if x.ndim == 2:
            return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return jax.lax.all_to_all(x, self.axis, 2, 1, tiled=True)

    def move_from_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """Sends every other device its part of the length."""
        return jax.lax.all_to_all(x, self.axis, 1, 2, tiled=True)

    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """Whole rows of some heads: nothing is left to exchange."""
        return attend(queries, keys, options)

    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """The same for the gradients."""
        return attend_backward(queries, keys, cotangents, options)


LAYOUTS: dict[str, type[AttentionLayout]] = {"ring": RingAttention, "all_to_all": UlyssesAttention}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def context_parallel_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    hidden: Hidden,
    options: BlockOptions,
    layout: AttentionLayout,
) -> jax.Array:
    """Returns softmax(q kᵀ / √H + mask) v, the softmax in f32, without gathering a length.

    Queries and results are [batch, length, heads, head_dim] in the dtype of the queries, keys and
    values [batch, length, kv_heads, head_dim]. The backward pass keeps the inputs in the compute
    layout, the output and one number per query; it repeats the exchanges of keys and values instead
    of keeping what arrived. The window is in `hidden`, causal mask and soft cap in `options`.
    """
    # By position: a `custom_vjp` hands all six on so.
    arguments = (query, key, value, hidden, options, layout)
    return _attention_fwd(*arguments)[0]


def _attention_fwd(  # one argument for each of `context_parallel_attention`
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    hidden: Hidden,
    options: BlockOptions,
    layout: AttentionLayout,
) -> tuple[jax.Array, tuple[Any, ...]]:
    inputs = layout.to_compute_layout((query, key, value, hidden), options)
    out, lse = layout.attend(inputs, options)
    out = layout.from_compute_layout(out, options)
    # One name for both, so that a policy that keeps the output keeps the logarithms as well.
    out, lse = checkpoint_name((out, lse), "attn_mix")
    return out, (inputs, out, lse)


def _attention_bwd(
    options: BlockOptions, layout: AttentionLayout, residuals: tuple[Any, ...], g: jax.Array
) -> tuple[Any, ...]:
    inputs, out, lse = residuals
    delta = (out.astype(jnp.float32) * g).sum(-1)
    g, delta = layout.to_compute_layout((g, delta), options)
    grads = layout.attend_backward(inputs, Cotangents(lse, delta, g), options)
    return *layout.from_compute_layout(grads, options), None


context_parallel_attention.defvjp(_attention_fwd, _attention_bwd)


@final
@dataclasses.dataclass(frozen=True)
class ContextAttention(Override):
    """Attention over a length that `axis` splits."""

    attention: str = "ring"  # `"ring"` or `"all_to_all"`
    kv_heads: str = "split"  # `"split"` or `"replicate"`, see `context`

    def __call__(
        self,
        around: StepContext,
        plain: Callable[..., jax.Array],
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        causal: bool,
        implementation: str,
        window: int | jax.Array | None = None,
        softcap: float | None = None,
    ) -> jax.Array:
        """Returns what `plain` would, block by block, whatever `implementation` says."""
        sizes, head_axes = around.mesh.shape, _split_axes(around, "heads")
        shards = math.prod(sizes[axis] for axis in head_axes)
        if self.attention == "all_to_all":
            shards *= sizes[self.axis]
        repeatable = self.kv_heads == "replicate" or _split_axes(around, "kv_heads") != head_axes
        problems = self._length_problems(around, query, key, segment_ids, causal)
        problems += self._head_problems(query, key, shards, repeatable)
        headline = f"Attention cannot be split on mesh {format_mesh(sizes)}."
        raise_all(ShardingError, headline, problems)
        # 2 key heads over 4 shards become 4, each repeated once; 6 over 4 become 12.
        copies = math.lcm(key.shape[2], shards) // key.shape[2]
        if copies > 1:
            key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
        layout = self._layout(
            mesh=around.mesh,
            axis=self.axis,
            row_axes=around.free_row_axes,
            head_axes=head_axes,
            vmapped_axes=around.gradient_shard_axes,
        )
        blocks = layout.size - 1
        if causal and isinstance(window, int) and isinstance(layout, RingAttention):
            # A block's first query sees window - 1 keys of the blocks before.
            needed = -(-(window - 1) // (query.shape[1] // layout.size))
            if needed < blocks:
                blocks, layout = needed, dataclasses.replace(layout, reach=needed)
        hidden = Hidden(segment_ids)
        if window is not None:
            positions = jax.lax.broadcasted_iota(jnp.int32, query.shape[:2], 1)
            hidden = Hidden(segment_ids, positions, positions - window + 1)
        options = BlockOptions(causal, softcap=softcap)
        arguments = (query, key, value, hidden, options, layout)
        return record_fact(context_parallel_attention(*arguments), RING_BLOCKS, blocks)

    @property
    def _layout(self) -> type[AttentionLayout]:
        """In a stage of a pipeline, other stages do something else: no permute over all of them."""
        return (
            PairwiseExchange
            if self.attention == "ring" and manual_axes()
            else LAYOUTS[self.attention]
        )

    def _length_problems(
        self,
        around: StepContext,
        query: jax.Array,
        key: jax.Array,
        segment_ids: jax.Array | None,
        causal: bool,
    ) -> list[Problem]:
        length, n = query.shape[1], around.mesh.shape[self.axis]
        pieces = 2 * n if causal and self.attention == "ring" else n
        problems = []
        if length % pieces:
            cut = f"{pieces} pieces, two per device" if pieces > n else f"{n} pieces"
            why = f"length {length} does not split into {cut} ({self.axis}={n})"
            near = max(pieces, round(length / pieces) * pieces)
            problems.append(Problem(f"queries {_type(query)}", why, f"a length of {near}"))
        if self._layout is PairwiseExchange and n % 2:
            why = (
                f"a ring of {self.axis}={n} in a pipeline stage exchanges in pairs: n must be even"
            )
            fix = f"{self.axis}={n + 1}, or strategies.context(attention='all_to_all')"
            problems.append(Problem("attention='ring'", why, fix))
        if key.shape[1] != length:
            why = f"{key.shape[1]} keys for {length} queries; a split length must be equal for both"
            problems.append(Problem(f"keys {_type(key)}", why, "attention of a row on itself"))
        if segment_ids is not None and segment_ids.shape != query.shape[:2]:
            why = f"not one id per token of {_type(query)}"
            fix = f"segment_ids of shape {query.shape[:2]}"
            problems.append(Problem(f"segment_ids {_type(segment_ids)}", why, fix))
        return problems

    def _head_problems(
        self, query: jax.Array, key: jax.Array, shards: int, repeatable: bool
    ) -> list[Problem]:
        heads, key_heads = query.shape[2], key.shape[2]
        split = f"split {shards} ways by {self.attention} attention and the axes of heads"
        if heads % shards:
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            why = f"{heads} heads cannot be {split}"
            fix = f"{math.lcm(heads, shards)} heads, or {divisors} ways in all, or attention='ring'"
            return [Problem(f"queries {_type(query)}", why, fix)]
        if key_heads % shards and not repeatable:
            why = f"{key_heads} key heads cannot be {split}"
            fix = f"kv_heads={math.lcm(key_heads, shards)} in the model, "
            fix += "or strategies.context(kv_heads='replicate')"
            return [Problem(f"keys {_type(key)}", why, fix)]
        return []


def _split_axes(around: StepContext, name: str) -> tuple[str, ...]:
    """Mesh axes that split a dim of activations; absent ones are reported elsewhere."""
    axes = axes_of(around.spec((name,))[0])
    return tuple(axis for axis in axes if axis in around.mesh.shape)


def _type(x: jax.Array) -> str:
    return short_type(x.shape, x.dtype)
