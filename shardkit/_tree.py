"""Leaves of a pytree by path, with short names for dtypes and sizes in bytes."""

import dataclasses
from typing import Any

import jax
import numpy as np

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a rule may look at: one array of a pytree, without its values.

    Attributes:
      path: names of the keys that lead to it, joined by `/`: `decoder/mlp/up/kernel`.
      shape: global shape.
      dtype: element type; a typed PRNG key has its key dtype.
      axes: one logical axis name (or None) per dim, or None when the model names none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, on all devices together and without replicas."""
        return nbytes(self.shape, self.dtype)

    def __str__(self) -> str:
        """Returns `decoder/mlp/up/kernel f32[1024,4096]`."""
        return f"{self.path or '(root)'} {short_type(self.shape, self.dtype)}"


def path_str(key_path: tuple[Any, ...]) -> str:
    """Joins a JAX key path with `/`, whatever kind of node each key comes from.

    >>> import jax
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [1, {"b": 2}]})]
    ['a/0', 'a/1/b']
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def short_dtype(dtype: Any) -> str:
    """Returns `f32`, `bf16`, `i8`, `bool`, or the name itself for any other dtype."""
    name = str(getattr(dtype, "name", dtype))
    stem = name.rstrip("0123456789")
    return _SHORT[stem] + name[len(stem) :] if stem in _SHORT and stem != name else name


def short_type(shape: tuple[int, ...], dtype: Any) -> str:
    """Returns `f32[1024,4096]`, as XLA prints it."""
    return f"{short_dtype(dtype)}[{','.join(map(str, shape))}]"


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array; a typed PRNG key counts the words that hold it."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return int(np.prod(data.shape)) * data.dtype.itemsize
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def leaves(tree: Any, axes: Any = None) -> list[Leaf]:
    """Lists a pytree of arrays or `jax.ShapeDtypeStruct` as `Leaf`s, in JAX's order.

    Args:
      tree: the pytree.
      axes: `{path: logical axes}` for the leaves whose dims are named.
    """
    names = axes or {}
    return [
        Leaf(path_str(path), tuple(x.shape), x.dtype, names.get(path_str(path)))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def format_bytes(n: float) -> str:
    """Returns `1.50 GiB`, `12.0 KiB`, `17 B`.

    >>> format_bytes(1536), format_bytes(17)
    ('1.50 KiB', '17 B')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        size = n / 1024**power
        if abs(size) >= 1:
            return f"{size:.0f} {unit}" if abs(size) >= 100 else f"{size:.2f} {unit}"
    return f"{n:.0f} B"
