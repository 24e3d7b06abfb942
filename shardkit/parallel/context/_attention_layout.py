"""A way of computing attention over a length that a mesh axis splits, as bodies per device.

Dims: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H head width.

Arrays arrive with their length split, in order. A way first moves them (`enter`), computes, and
moves the result back (`leave`, the inverse and, as both only move elements, the transpose). No
derivative is ever taken through a body: `across` states the gradient in terms of the same moves.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[str, ...]
Spec = Callable[[int], PartitionSpec]


@dataclasses.dataclass(frozen=True)
class Way(abc.ABC):
    """Where the arrays of attention live, and how they are computed with.

    Attributes:
      mesh: the device mesh.
      axis: the mesh axis that splits the length.
      rows: mesh axes that split the rows.
      heads: mesh axes that split heads and key heads.
      mapped: mesh axes that a `jax.vmap` around splits over.
    """

    mesh: Mesh
    axis: str
    rows: Axes
    heads: Axes
    mapped: Axes = ()

    @property
    def size(self) -> int:
        """Devices that share one length."""
        return self.mesh.shape[self.axis]

    def enter(self, arrays: Any, causal: bool) -> Any:
        """Moves [batch, length, …] arrays of a pytree from their order to that of the work."""
        return self._move(self.moved_in, arrays, causal, self.outer, self.inner)

    def leave(self, arrays: Any, causal: bool) -> Any:
        """Moves arrays back."""
        return self._move(self.moved_out, arrays, causal, self.inner, self.outer)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns [B, T, N, H] in the dtype of q, and f32[B, T, N], logarithms of softmax sums.

        All arrays are as `enter` left them.
        """

        def body(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> Any:
            heads = k.shape[2]
            out, lse = self.part(grouped(q, heads), _turned(k), _turned(v), ids, causal)
            return ungrouped(out).astype(q.dtype), ungrouped(lse)

        return self._run(body, (q, k, v, ids), self.inner, self.inner(3))

    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        ids: jax.Array | None,
        lse: jax.Array,
        delta: jax.Array,
        g: jax.Array,
        causal: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the gradients of q, k and v in their dtypes; the softmax is computed again.

        All arrays are as `enter` left them; lse and delta are f32[B, T, N].
        """

        def body(
            q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, lse: Any, delta: Any, g: Any
        ) -> Any:
            heads = k.shape[2]
            lse, delta = grouped(lse, heads), grouped(delta, heads)
            tokens = grouped(q, heads), _turned(k), _turned(v), ids
            dq, dk, dv = self.part_backward(*tokens, lse, delta, grouped(g, heads), causal)
            found = ungrouped(dq), _turned(dk), _turned(dv)
            return tuple(x.astype(y.dtype) for x, y in zip(found, (q, k, v), strict=True))

        return self._run(body, (q, k, v, ids, lse, delta, g), self.inner, self.inner(3))

    def outer(self, ndim: int) -> PartitionSpec:
        """Spec of an array outside, whose first dims are batch, length, heads."""
        return PartitionSpec(*(self.rows or None, self.axis, self.heads or None)[:ndim])

    @abc.abstractmethod
    def inner(self, ndim: int) -> PartitionSpec:
        """The same between `enter` and `leave`."""

    @abc.abstractmethod
    def moved_in(self, x: jax.Array, causal: bool) -> jax.Array:
        """One device's array between `enter` and `leave`, from what it holds outside."""

    @abc.abstractmethod
    def moved_out(self, x: jax.Array, causal: bool) -> jax.Array:
        """The inverse."""

    @abc.abstractmethod
    def part(self, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, causal: bool) -> Any:
        """One device's queries against the keys of all devices, laid out as `attend` has them.

        Args:
          q: [B, K, G, T, H].
          k: [B, K, S, H].
          v: [B, K, S, H].
          ids: i32[B, T], or None.
          causal: whether a query sees its own position and earlier ones alone.

        Returns:
          A `Part`.
        """

    @abc.abstractmethod
    def part_backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        ids: Any,
        lse: jax.Array,
        delta: jax.Array,
        g: jax.Array,
        causal: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of one device's q, k and v, f32, laid out as these."""

    def _move(
        self,
        move: Callable[[jax.Array, bool], jax.Array],
        arrays: Any,
        causal: bool,
        before: Spec,
        after: Spec,
    ) -> Any:
        def body(arrays: Any) -> Any:
            return jax.tree.map(lambda x: move(x, causal), arrays)

        out = jax.tree.map(lambda x: after(x.ndim), arrays)
        return self._run(body, (arrays,), before, out)

    def _run(self, body: Callable[..., Any], args: Any, spec: Spec, out_specs: Any) -> Any:
        """Runs a body on every device; axes that split none of the arrays stay the compiler's."""
        around = jax.sharding.get_abstract_mesh()  # inside of another `shard_map`, its mesh
        run = jax.shard_map(
            body,
            mesh=self.mesh if around.empty else around,
            in_specs=jax.tree.map(lambda x: spec(x.ndim), args),
            out_specs=out_specs,
            axis_names={self.axis, *self.rows, *self.heads, *self.mapped},
            check_vma=False,  # which only derivatives would need
        )
        return run(*args)


def grouped(x: jax.Array, key_heads: int) -> jax.Array:
    """[B, T, N, …] as [B, K, G, T, …]: products batch over B and K, and K, V stay unrepeated."""
    B, T, N, *rest = x.shape
    apart = x.reshape(B, T, key_heads, N // key_heads, *rest)
    return jnp.moveaxis(apart, 1, 3)


def ungrouped(x: jax.Array) -> jax.Array:
    """The inverse of `grouped`."""
    B, K, G, T, *rest = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, K * G, *rest)


def _turned(x: jax.Array) -> jax.Array:
    """[B, S, K, H] as [B, K, S, H], and back."""
    return x.transpose(0, 2, 1, 3)
