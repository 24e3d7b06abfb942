"""How the dims of a stored tensor become those of a leaf: `"(n h) e -> e n h"`.

Letters name dims; left are those of the stored tensor, right those of the leaf. Dims in brackets
are one dim of the tensor. `1/3` is the second of three equal parts, as where one tensor holds
queries, keys and values: `"e (1/3 n h) -> e n h"`. The letter `v` counts tokens: that dim of the
leaf may be padded.

A pattern only reshapes, takes a part and transposes, so the result is a view of the tensor: a slice
of the leaf reads the bytes of this slice, and an assignment to it writes them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from .._core.errors import CheckpointError

VOCAB = "v"
_TOKEN = re.compile(r"\s*(\(|\)|->|\d+/\d+|[a-z]+)")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed pattern."""

    # one tuple of items for each dim of the tensor; an item is a letter, or `k/m`
    groups: tuple[tuple[str, ...], ...]
    leaf: tuple[str, ...]  # letters of the dims of the leaf, behind the stacked ones

    def stored_shape(self, leaf_shape: tuple[int, ...], padding: int = 0) -> tuple[int, ...]:
        """Returns the shape of the tensor, from the leaf's without its stacked dims.

        The tensor lacks `padding` rows of the leaf's dim `v`.

        >>> parse("e (1/3 n h) -> e n h").stored_shape((32, 4, 8))
        (32, 96)
        """
        return tuple(math.prod(group) for group in self._sizes(leaf_shape, padding))

    def view(self, stored: np.ndarray, leaf_shape: tuple[int, ...], padding: int = 0) -> np.ndarray:
        """Returns a view of a contiguous tensor of `stored_shape` with the leaf's dims, unpadded.

        >>> parse("(n h) e -> e n h").view(np.zeros((6, 5)), (5, 2, 3)).shape
        (5, 2, 3)
        """
        expanded = stored.reshape([n for group in self._sizes(leaf_shape, padding) for n in group])
        items = [item for group in self.groups for item in group]
        part = tuple(int(i.split("/")[0]) if "/" in i else slice(None) for i in items)
        names = [item for item in items if "/" not in item]
        return expanded[part].transpose([names.index(name) for name in self.leaf])

    @property
    def part(self) -> tuple[str, ...]:
        """The part of the tensor that the leaf is: `("1/3",)`, or `()` for all of it."""
        return tuple(item for group in self.groups for item in group if "/" in item)

    def rows(self, leaf_shape: tuple[int, ...], padding: int = 0) -> tuple[int, int]:
        """Returns the dim of the leaf that counts the tensor's rows, and the elements of a row.

        Consecutive indices of this dim are consecutive in the file; those of others are not.

        >>> parse("(n h) e -> e n h").rows((5, 2, 3))
        (1, 15)
        """
        items = [item for group in self.groups for item in group]
        sizes = [n for group in self._sizes(leaf_shape, padding) for n in group]
        first = next(at for at, item in enumerate(items) if "/" not in item)
        return self.leaf.index(items[first]), math.prod(sizes[first + 1 :])

    def _sizes(self, leaf_shape: tuple[int, ...], padding: int) -> list[list[int]]:
        sizes = dict(zip(self.leaf, leaf_shape, strict=True))
        if VOCAB in sizes:
            sizes[VOCAB] -= padding
        return [[_size(item, sizes) for item in group] for group in self.groups]


def _size(item: str, sizes: Mapping[str, int]) -> int:
    return int(item.split("/")[1]) if "/" in item else sizes[item]


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Pattern:
    """Parses a pattern; raises CheckpointError if it is none."""
    left, arrow, right = text.partition("->")
    groups, leaf = _groups(left), right.split()
    names = [item for group in groups or () for item in group if "/" not in item]
    parts = [item.split("/") for group in groups or () for item in group if "/" in item]
    fits = sorted(names) == sorted(leaf) and len(set(leaf)) == len(leaf)
    if not arrow or groups is None or not fits or any(int(k) >= int(m) for k, m in parts):
        why = "does not say how the dims of a tensor become those of a leaf"
        fix = "'(n h) e -> e n h': every letter once on each side"
        raise CheckpointError.of("A table of tensors cannot be read.", repr(text), why, fix)
    return Pattern(groups, tuple(leaf))


def _groups(text: str) -> tuple[tuple[str, ...], ...] | None:
    """Splits one side of a pattern; None if it is malformed."""
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        token = match[1] if match else "->"
        if match is None or token == "->" or (token in "()" and (token == "(") != (inside is None)):
            return None
        position = match.end()
        if token == "(":
            inside = []
        elif token == ")":
            groups, inside = [*groups, tuple(inside or ())], None
        elif inside is not None:
            inside.append(token)
        else:
            groups.append((token,))
    return None if inside is not None else tuple(groups)
