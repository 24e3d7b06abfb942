"""How the arrays of attention are laid out while a split length is attended to.

Dims: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H head width.

Arrays arrive with their length split, in order. A layout moves them (`to_compute_layout`), attends,
and moves the result back (`from_compute_layout`: the inverse and, since both only move elements,
the transpose). No derivative is taken through a body per device: `context_parallel_attention`
states the gradient in terms of the same moves.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..._core.types import PyTree
from ...nn._blockwise import BlockOptions
from ._blockwise import Cotangents, Gradients, Keys, Partial, Queries

Axes = tuple[str, ...]
# q [B, T, N, H], k and v [B, S, K, H], and what is hidden.
Inputs = tuple[jax.Array, jax.Array, jax.Array, "Hidden"]
SpecOfRank = Callable[[int], PartitionSpec]


class Hidden(NamedTuple):
    """What hides keys from queries beside the causal mask; i32[B, T] each, None for nothing."""

    ids: jax.Array | None = None  # segments; a query sees only keys of its own
    positions: jax.Array | None = None  # of the keys; None without `first`
    first: jax.Array | None = None  # of each query, the first position that its window shows


@dataclasses.dataclass(frozen=True)
class AttentionLayout(abc.ABC):
    """Which mesh axes split the arrays of attention, and how devices exchange them."""

    mesh: Mesh  # the device mesh
    axis: str  # the mesh axis that splits the length
    row_axes: Axes  # mesh axes that split the rows
    head_axes: Axes  # mesh axes that split heads and key heads
    vmapped_axes: Axes = ()  # mesh axes that an enclosing `jax.vmap` splits over

    @property
    def size(self) -> int:
        """Devices that share one length."""
        return self.mesh.shape[self.axis]

    def to_compute_layout(self, arrays: PyTree, options: BlockOptions) -> PyTree:
        """Moves a pytree of [batch, length, …] arrays to where they are computed with."""
        return self._move(self.move_to_compute, arrays, options, self.input_spec, self.compute_spec)

    def from_compute_layout(self, arrays: PyTree, options: BlockOptions) -> PyTree:
        """The inverse of `to_compute_layout`."""
        return self._move(
            self.move_from_compute, arrays, options, self.compute_spec, self.input_spec
        )

    def attend(self, inputs: Inputs, options: BlockOptions) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, N, H] in the dtype of q, and f32[B, T, N], logarithms of softmax sums.

        Inputs are q, k, v and what is hidden, in the compute layout.
        """

        def body(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
            queries, keys = _group_heads(inputs)
            out, lse = self.attend_shard(queries, keys, options)
            return _ungroup(out).astype(inputs[0].dtype), _ungroup(lse)

        return self._run(body, (inputs,), self.compute_spec, self.compute_spec(3))

    def attend_backward(
        self, inputs: Inputs, cotangents: Cotangents, options: BlockOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the gradients of q, k and v in their dtypes; the softmax is computed again.

        Cotangents are lse and delta f32[B, T, N], g [B, T, N, H]; the others as for `attend`.
        """

        def body(inputs: Inputs, cotangents: Cotangents) -> Any:
            queries, keys = _group_heads(inputs)
            grouped = Cotangents(*(_group(x, keys.k.shape[1]) for x in cotangents))
            dq, dk, dv = self.attend_shard_backward(queries, keys, grouped, options)
            grads = _ungroup(dq), _swap_length_and_heads(dk), _swap_length_and_heads(dv)
            return tuple(g.astype(x.dtype) for g, x in zip(grads, inputs[:3], strict=True))

        return self._run(body, (inputs, cotangents), self.compute_spec, self.compute_spec(3))

    def input_spec(self, ndim: int) -> PartitionSpec:
        """Spec of an input or output, whose first dims are batch, length, heads."""
        return PartitionSpec(*(self.row_axes or None, self.axis, self.head_axes or None)[:ndim])

    @abc.abstractmethod
    def compute_spec(self, ndim: int) -> PartitionSpec:
        """Spec of the same array in the compute layout."""

    @abc.abstractmethod
    def move_to_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """One device's array in the compute layout, from its shard of the input."""

    @abc.abstractmethod
    def move_from_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """The inverse of `move_to_compute`."""

    @abc.abstractmethod
    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """One device's queries against the keys of all devices, of which it has its own."""

    @abc.abstractmethod
    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """Gradients of one device's q, k and v, f32, laid out as these."""

    def _move(
        self,
        move: Callable[[jax.Array, BlockOptions], jax.Array],
        arrays: PyTree,
        options: BlockOptions,
        before: SpecOfRank,
        after: SpecOfRank,
    ) -> PyTree:
        def body(arrays: PyTree) -> PyTree:
            return jax.tree.map(lambda x: move(x, options), arrays)

        out = jax.tree.map(lambda x: after(x.ndim), arrays)
        return self._run(body, (arrays,), before, out)

    def _run(
        self, body: Callable[..., Any], args: PyTree, spec: SpecOfRank, out_specs: PyTree
    ) -> Any:
        """Runs a body on every device; axes that split none of the arrays stay automatic."""
        current = jax.sharding.get_abstract_mesh()  # of an enclosing `shard_map`, if there is one
        run = jax.shard_map(
            body,
            mesh=self.mesh if current.empty else current,
            in_specs=jax.tree.map(lambda x: spec(x.ndim), args),
            out_specs=out_specs,
            axis_names={self.axis, *self.row_axes, *self.head_axes, *self.vmapped_axes},
            check_vma=False,  # which only derivatives would need
        )
        return run(*args)


def _group_heads(inputs: Inputs) -> tuple[Queries, Keys]:
    q, k, v, (ids, positions, first) = inputs
    keys = Keys(_swap_length_and_heads(k), _swap_length_and_heads(v), ids, positions)
    return Queries(_group(q, k.shape[2]), ids, first), keys


def _group(x: jax.Array, key_heads: int) -> jax.Array:
    """[B, T, N, …] as [B, K, G, T, …]: products batch over B and K, and K, V stay unrepeated."""
    B, T, N, *width = x.shape
    return jnp.moveaxis(x.reshape(B, T, key_heads, N // key_heads, *width), 1, 3)


def _ungroup(x: jax.Array) -> jax.Array:
    """The inverse of `_group`."""
    B, K, G, T, *width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, K * G, *width)


def _swap_length_and_heads(x: jax.Array) -> jax.Array:
    """[B, S, K, H] as [B, K, S, H], and back."""
    return x.transpose(0, 2, 1, 3)
