"""Leaves of a pytree by path, with short names for dtypes and sizes in bytes.

A path is text, by which rules, checkpoints and messages name a leaf. Two leaves of a tree whose
dict keys contain `/` can have the same path; `leaves_by_path` refuses such a tree, so everything
that stores leaves by path calls it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import Problem, TreeError, format_problems, printable, raise_all

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


def path_ends(path: str) -> Iterator[str]:
    """Yields a path, what is left of it without its first keys, and the empty path.

    Optimizer state belongs to the parameter at the first of these that is one.

    >>> list(path_ends("0/mu/up"))
    ['0/mu/up', 'mu/up', 'up', '']
    """
    while path:
        yield path
        path = path.partition("/")[2]
    yield ""


def leaves_by_path(
    tree: Any, name: str = "", is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Returns `{path: leaf}` of a pytree, in JAX's order; paths begin with the name of the tree.

    Raises TreeError if two leaves have the same path, or a dict has keys of several types.

    >>> leaves_by_path({"a": [1, {"b": 2}]}, "params"), leaves_by_path(3, "params")
    ({'params/a/0': 1, 'params/a/1/b': 2}, {'params': 3})
    """
    flatten_tree(tree, name)
    leaves: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    problems = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = join_path(name, path_str(key_path))
        if path in leaves:
            pair = ((keys[path], leaves[path]), (key_path, leaf))
            both = " and ".join(f"{name}{jax.tree_util.keystr(k)}{_type_of(x)}" for k, x in pair)
            problems.append(Problem(path or "(root)", f"is the path of {both}"))
        leaves[path], keys[path] = leaf, key_path
    fix = (
        "rename one key, such as 'a/b' to 'a_b': rules, checkpoints and reports name a leaf by its "
        "keys, joined by '/'"
    )
    raise_all(TreeError, "Leaves of a pytree have the same path.", problems, fix)
    return leaves


def flatten_tree(tree: Any, name: str) -> tuple[list[Any], Any]:
    """Returns the leaves of a pytree and its structure, as `jax.tree.flatten`.

    Raises TreeError with each dict whose keys have no order, as in `{1: x, "1": y}`.
    """
    try:
        return jax.tree.flatten(tree)
    except ValueError as error:
        problems = list(_unordered_keys(tree, name))
        if not problems:
            raise
        fix = 'keys of one type: {"1": x, "2": y}'
        headline = "A dict of a pytree has keys that cannot be sorted."
        raise TreeError(format_problems(headline, problems, fix)) from error


def _unordered_keys(tree: Any, path: str) -> Iterator[Problem]:
    items = tree.items() if isinstance(tree, dict) else []
    items = enumerate(tree) if isinstance(tree, list | tuple) else items
    if isinstance(tree, dict) and len({type(key) for key in tree}) > 1:
        why = f"has keys of several types: {', '.join(map(repr, tree))}"
        yield Problem(path or "(root)", why)
    for key, value in items:
        yield from _unordered_keys(value, join_path(path, str(key)))


def _type_of(x: Any) -> str:
    """` f32[4]` of an array, or nothing."""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return f" {short_type(x.shape, x.dtype)}" if is_array else ""


def short_dtype(dtype: Any) -> str:
    """Returns `f32`, `bf16`, `i8`, `bool`, or the name itself for any other dtype."""
    name = str(getattr(dtype, "name", dtype))
    stem = name.rstrip("0123456789")
    return _SHORT[stem] + name[len(stem) :] if stem in _SHORT and stem != name else name


def short_type(shape: tuple[int, ...], dtype: Any) -> str:
    """Returns `f32[1024,4096]`, as XLA prints it."""
    return f"{short_dtype(dtype)}[{','.join(map(str, shape))}]"


def is_numeric(x: Any) -> bool:
    """Whether a value is an array of numbers, keys or bools, or a number of Python."""
    if isinstance(x, np.ndarray | np.generic):
        # Numbers of 16 bits and fewer of JAX's own are of kind V, as records are.
        is_record = x.dtype.type is np.void
        # Longer than any number of JAX: 80 or 128 bits.
        is_long = x.dtype.type in (np.longdouble, np.clongdouble)
        return x.dtype.kind not in "OSUMm" and not is_record and not is_long
    return isinstance(x, jax.Array | int | float | complex)


def describe_type(x: Any) -> str:
    """The type of a value as errors name it.

    >>> describe_type(jnp.ones((2, 3))), describe_type(1.0), describe_type({})
    ('f32[2,3]', 'f32[]', 'dict')
    """
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        return short_type(x.shape, x.dtype)
    return short_type((), jnp.result_type(x)) if is_numeric(x) else type(x).__name__


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array, for typed PRNG keys those of their words."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return int(np.prod(data.shape)) * data.dtype.itemsize
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def list_leaves(tree: Any, axes: Any = None) -> list[Leaf]:
    """Lists the leaves of a pytree of arrays or `jax.ShapeDtypeStruct`, in JAX's order.

    Dims have the names of `{path: logical axes}`. Raises TreeError if two leaves have the same
    path.
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
