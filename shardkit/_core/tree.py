"""Leaves of a pytree by path, with short names for dtypes and sizes in bytes.

A path is text, by which rules, checkpoints and messages name a leaf. Two leaves of a tree whose
dict keys contain `/` can have the same path; `leaves_by_path` refuses such a tree, so everything
that stores leaves by path calls it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import Problem, TreeError, printable, raise_all

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a pytree, without its values: all that a rule can depend on.

    Attributes:
      path: its keys, joined by `/`: `decoder/mlp/up/kernel`.
      shape: global shape.
      dtype: element type; a typed PRNG key has its key dtype.
      axes: one logical axis name or None per dim; None if the model names no dims.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the global array, counted once."""
        return nbytes(self.shape, self.dtype)

    def within(self, tree: str) -> "Leaf":
        """Returns the leaf with its path in a tree of trees: `params/decoder/mlp/up/kernel`."""
        return dataclasses.replace(self, path=join_path(tree, self.path))

    def __str__(self) -> str:
        """Returns `decoder/mlp/up/kernel f32[1024,4096]`."""
        return f"{self.path or '(root)'} {short_type(self.shape, self.dtype)}"


def path_str(key_path: tuple[Any, ...]) -> str:
    """Joins the keys of a JAX key path with `/`.

    An empty key becomes two quotes, since the empty path is that of a bare array. Control
    characters are escaped.

    >>> import jax
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [1, {"b": 2}]})]
    ['a/0', 'a/1/b']
    """
    keys = (printable(jax.tree_util.keystr((key,), simple=True)) for key in key_path)
    return "/".join(key or "''" for key in keys)


def join_path(tree: str, path: str) -> str:
    """Returns the path of a leaf in a tree of trees; that of a bare array is the tree's name.

    >>> join_path("params", "up/kernel"), join_path("params", "")
    ('params/up/kernel', 'params')
    """
    return f"{tree}/{path}" if tree and path else tree or path


def path_to_glob(path: str) -> str:
    """Returns a glob that matches a leaf: its path, or `**` for the empty path of a bare array.

    >>> path_to_glob("up/kernel"), path_to_glob("")
    ('up/kernel', '**')
    """
    return path or "**"


def ends_path(path: str, end: str) -> bool:
    """Whether a path ends in the segments of another; every path ends in the empty one.

    >>> ends_path("0/mu/up", "up"), ends_path("0/mu/warmup", "up"), ends_path("0/mu", "")
    (True, False, True)
    """
    return not end or f"/{path}".endswith(f"/{end}")


def leaves_by_path(tree: Any, name: str = "") -> dict[str, Any]:
    """Returns `{path: leaf}` of a pytree, in JAX's order.

    Args:
      tree: the pytree.
      name: of the tree, the first segment of every path.

    Raises:
      TreeError: two leaves have the same path.

    >>> leaves_by_path({"a": [1, {"b": 2}]}, "params"), leaves_by_path(3, "params")
    ({'params/a/0': 1, 'params/a/1/b': 2}, {'params': 3})
    """
    leaves: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    problems = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = join_path(name, path_str(key_path))
        if path in leaves:
            both = " and ".join(name + jax.tree_util.keystr(k) for k in (keys[path], key_path))
            problems.append(Problem(path or "(root)", f"is the path of {both}"))
        leaves[path], keys[path] = leaf, key_path
    fix = "rename one key: rules and checkpoints name leaves by their keys, joined by '/'"
    raise_all(TreeError, "Leaves of a pytree have the same path.", problems, fix)
    return leaves


def short_dtype(dtype: Any) -> str:
    """Returns `f32`, `bf16`, `i8`, `bool`, or the name itself for any other dtype."""
    name = str(getattr(dtype, "name", dtype))
    stem = name.rstrip("0123456789")
    return _SHORT[stem] + name[len(stem) :] if stem in _SHORT and stem != name else name


def short_type(shape: tuple[int, ...], dtype: Any) -> str:
    """Returns `f32[1024,4096]`, as XLA prints it."""
    return f"{short_dtype(dtype)}[{','.join(map(str, shape))}]"


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array, for typed PRNG keys those of their words."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return int(np.prod(data.shape)) * data.dtype.itemsize
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def list_leaves(tree: Any, axes: Any = None) -> list[Leaf]:
    """Lists the leaves of a pytree of arrays or `jax.ShapeDtypeStruct`, in JAX's order.

    Args:
      tree: the pytree.
      axes: `{path: logical axes}` of the leaves whose dims are named.

    Raises:
      TreeError: two leaves have the same path.
    """
    names = axes or {}
    return [
        Leaf(path, tuple(x.shape), x.dtype, names.get(path))
        for path, x in leaves_by_path(tree).items()
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
