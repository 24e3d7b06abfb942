"""A table `{leaf: (tensors, pattern)}`, and the tensors that each leaf of a pytree is made of.

    "layers/query": ("model.layers.{i}.self_attn.q_proj.weight", "(n h) e -> e n h")

`{i}` counts from 0. If the leaf's path has it too, each layer is a leaf; otherwise the leaf stacks
the tensors of all layers along its first dim, and those of all `{j}` along the second.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.errors import CheckpointError, Problem, did_you_mean, raise_all
from .._core.tree import short_type
from ._pattern import VOCAB, Pattern, parse
from ._tensor_files import StoredTensor

Table = Mapping[str, tuple[str, str]]
"""`{path of a leaf: (name of its tensors, pattern)}`; see `Pattern` and this module."""

Box = tuple[tuple[int, int], ...]

# Of a mapped file in memory at once. A transposed slice touches every page of its rows.
_MAPPED_BYTES = 2**21

_TOO_LARGE = "Finite values would become infinite."
_RESCALE = "a dtype with larger values, such as bfloat16 or float32"

_PLACE = re.compile(r"\{([a-z])\}")


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """The tensors of one leaf."""

    path: str  # of the leaf
    shape: tuple[int, ...]  # of the leaf
    dtype: Any  # of the leaf
    # `{(i, j): name}` of the tensors by their place in the stacked dims; `()` without any
    names: Mapping[tuple[int, ...], str]
    pattern: Pattern  # from the dims of one tensor to those of the leaf behind the stacked ones
    padding: int = 0  # rows of the leaf's vocabulary that the tensors lack

    @property
    def type(self) -> str:
        """Returns `layers/query f32[2,32,4,8]`."""
        return f"{self.path} {short_type(self.shape, self.dtype)}"

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of what one tensor gives."""
        return self.shape[len(self.shape) - len(self.pattern.leaf) :]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape that each tensor must have."""
        return self.pattern.stored_shape(self.inner, self.padding)

    def pieces(
        self, index: tuple[slice, ...]
    ) -> Iterator[tuple[str, tuple[slice, ...], tuple[Any, ...]]]:
        """Yields the parts that tensors hold of a slice of the leaf, of step 1, few rows at a time.

        Each is a tensor's name, the slice of its `Pattern.view`, and where that is in the slice.
        """
        box: Box = tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))
        depth = len(self.shape) - len(self.inner)
        named = zip(self.inner, self.pattern.leaf, strict=True)
        stop = [n - self.padding if dim == VOCAB else n for n, dim in named]
        inner = [(first, min(last, n)) for (first, last), n in zip(box[depth:], stop, strict=True)]
        if any(first >= last for first, last in inner):
            return
        blocks = list(self._row_blocks(inner))
        for place in itertools.product(*(range(*bounds) for bounds in box[:depth])):
            at = tuple(i - first for i, (first, _) in zip(place, box, strict=False))
            for part in blocks:
                here = [
                    slice(s.start - first, s.stop - first)
                    for s, (first, _) in zip(part, inner, strict=True)
                ]
                yield self.names[place], part, (*at, *here)

    def _row_blocks(self, box: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, ...]]:
        """Cuts a box of one tensor's dims along its rows in the file."""
        part = [slice(first, last) for first, last in box]
        if not part:
            yield ()
            return
        dim, elements = self.pattern.rows(self.inner, self.padding)
        step = max(1, _MAPPED_BYTES // (elements * np.dtype(self.dtype).itemsize))
        first, last = box[dim]
        for start in range(first, last, step):
            part[dim] = slice(start, min(start + step, last))
            yield tuple(part)

    def view(self, stored: np.ndarray) -> np.ndarray:
        """Returns a view of one tensor with the dims of the leaf."""
        return self.pattern.view(stored, self.inner, self.padding)

    def find_problems(
        self, tensors: Mapping[str, StoredTensor], unused: Mapping[str, StoredTensor]
    ) -> Iterator[Problem]:
        """Lists the tensors that are missing or have another shape."""
        for name in self.names.values():
            tensor = tensors.get(name)
            if tensor is None:
                hint = did_you_mean(name, unused)
                yield Problem(name, f"is missing, and {self.type} needs it.{hint}")
            elif tensor.shape != self.stored_shape:
                want = short_type(self.stored_shape, tensor.dtype)
                yield Problem(name, f"is {tensor.type}, and {self.type} needs {want}")


def _table_problems(table: object) -> Iterator[Problem]:
    """What a table of the user's own is, if it is none."""
    fix = '{"layers/query": ("model.layers.{i}.self_attn.q_proj.weight", "e (n h) -> ...")}'
    if not isinstance(table, Mapping):
        yield Problem("table", f"is of type {type(table).__name__}", fix)
        return
    for path, row in table.items():
        if not (isinstance(row, tuple | list) and len(row) == 2 and isinstance(row[1], str)):
            yield Problem(f"table[{path!r}]", f"is {row!r}, not tensors and a pattern", fix)
        places = _PLACE.findall(str(path))
        if len(set(places)) < len(places):
            yield Problem(f"table[{path!r}]", f"has {{{places[0]}}} twice", fix)


def find_sources(
    table: Table, leaves: Mapping[str, Any], padding: int
) -> tuple[dict[str, LeafSource], list[Problem]]:
    """Finds the tensors of every leaf; returns what is wrong with leaves that have none.

    Tensors lack `padding` rows of every dim `v`.
    """
    raise_all(CheckpointError, "A table of tensors cannot be read.", [*_table_problems(table)])
    rows = [(_compile(path), name, parse(text)) for path, (name, text) in table.items()]
    sources, problems = {}, []
    for path, leaf in leaves.items():
        matched = ((rule.fullmatch(path), name, pattern) for rule, name, pattern in rows)
        found = next(((m.groupdict(), name, p) for m, name, p in matched if m), None)
        shape = tuple(leaf.shape)
        if found is None:
            why = f"{short_type(shape, leaf.dtype)} is not in the table."
            problems.append(Problem(path, why + did_you_mean(path, table)))
            continue
        bound, name, pattern = found
        names = _expand(name, bound, shape, len(shape) - len(pattern.leaf))
        if names is None:
            why = f"{short_type(shape, leaf.dtype)} has not one dim for each of "
            why += f"{' '.join([*_free(name, bound), *pattern.leaf]) or 'no dims'}"
            problems.append(Problem(path, why))
            continue
        pad = padding if VOCAB in pattern.leaf else 0
        sources[path] = LeafSource(path, shape, leaf.dtype, names, pattern=pattern, padding=pad)
    return sources, problems


def keeps_values(stored: Any, wanted: Any, may_round: bool) -> bool:
    """Whether values of one dtype become another without loss, or may be rounded."""
    stored, wanted = jnp.dtype(stored), jnp.dtype(wanted)
    both_float = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (stored, wanted))
    if stored == wanted or not both_float or may_round:
        return stored == wanted or both_float
    return jnp.promote_types(stored, wanted) == wanted


def assign(array: np.ndarray, at: Any, values: np.ndarray, name: str) -> None:
    """Sets a part of an array, rounded; raises CheckpointError where finite values overflow."""
    both_float = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (array, values))
    if both_float and jnp.finfo(array.dtype).max < jnp.finfo(values.dtype).max:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = values.astype(array.dtype)
        lost = np.isfinite(values) & ~np.isfinite(rounded)
        if lost.any():
            why = f"has {float(values[lost].flat[0]):g}, which {array.dtype.name} cannot hold"
            raise_all(CheckpointError, _TOO_LARGE, [Problem(name, why, _RESCALE)])
        values = rounded
    array[at] = values


def padding_problems(padding: int) -> list[Problem]:
    """A number of rows is not negative."""
    why = f"{padding} is no number of rows"
    return [Problem("vocab_padding", why, "vocab_padding=0")] if padding < 0 else []


def count_uses(sources: Mapping[str, LeafSource]) -> dict[str, tuple[Fraction, bool]]:
    """Returns how much of each tensor the leaves are, and whether two are the same part of it."""
    parts: dict[str, list[tuple[str, ...]]] = {}
    for source in sources.values():
        for name in source.names.values():
            parts.setdefault(name, []).append(source.pattern.part)
    return {
        name: (sum(map(_share, set(used)), Fraction()), len(set(used)) < len(used))
        for name, used in parts.items()
    }


def _share(part: tuple[str, ...]) -> Fraction:
    return Fraction(1, math.prod(int(item.split("/")[1]) for item in part))


def _compile(path: str) -> re.Pattern[str]:
    """Returns a pattern of paths, with a group for each place: `layers/{i}/query`."""
    parts = _PLACE.split(path)
    return re.compile(
        "".join(f"(?P<{p}>[0-9]+)" if n % 2 else re.escape(p) for n, p in enumerate(parts))
    )


def _free(name: str, bound: Mapping[str, str]) -> list[str]:
    return [place for place in dict.fromkeys(_PLACE.findall(name)) if place not in bound]


def _expand(
    name: str, bound: Mapping[str, str], shape: tuple[int, ...], depth: int
) -> dict[tuple[int, ...], str] | None:
    """Returns the names of all stacked tensors; None if the leaf has other dims."""
    free = _free(name, bound)
    if depth != len(free):
        return None
    for place, number in bound.items():
        name = name.replace(f"{{{place}}}", number)
    names = {}
    for at in itertools.product(*(range(n) for n in shape[:depth])):
        one = name
        for place, number in zip(free, at, strict=True):
            one = one.replace(f"{{{place}}}", str(number))
        names[at] = one
    return names
