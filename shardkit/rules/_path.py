"""Rules by path: a table of globs, first match wins."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import Problem, ShardingError, raise_all
from .._core.options import check_arguments, option_problems
from .._core.tree import Leaf
from .._core.types import Trainable
from ._rule import Decided, Decision, Entry, Passed, Replicated
from ._specs import format_spec


@functools.lru_cache(maxsize=1024)
def _compile_glob(glob: str) -> re.Pattern[str]:
    """Compiles a glob to a pattern over a path whose every segment ends in `/`."""
    parts = []
    for segment in glob.split("/"):
        if segment == "**":
            parts.append("(?:[^/]*/)*")
        elif segment == "*":
            parts.append("[^/]*/")
        else:
            parts.append("[^/]*".join(map(re.escape, segment.split("*"))) + "/")
    return re.compile("".join(parts))


def selects(declared: Trainable, path: str) -> bool:
    """Whether globs, or a predicate, choose a path; None chooses every one."""
    if declared is None or callable(declared):
        return declared is None or bool(declared(path))
    globs = [declared] if isinstance(declared, str) else declared
    return any(matches(glob, path) for glob in globs)


def matches(glob: str, path: str) -> bool:
    """Whether a glob matches a path.

    `*` matches one segment, or any part of one (`layer_*`); `**` any number of segments, also
    none; every other character itself.

    >>> matches("**/up/kernel", "up/kernel"), matches("*/kernel", "up/kernel")
    (True, True)
    >>> matches("layer_*/kernel", "layer_3/up/kernel")
    False
    """
    return _compile_glob(glob).fullmatch(f"{path}/" if path else "") is not None


def _find_fault(glob: str) -> str:
    """Returns why a glob is malformed, or ""."""
    segments = glob.split("/") if isinstance(glob, str) else [""]
    if "" in segments:
        return "a glob has an empty segment: a slash at one end, or two in a row"
    if any("**" in s and s != "**" for s in segments):
        return "'**' matches whole segments; use one '*' inside a segment"
    return ""


def _suggest_path(glob: str, leaves: list[Leaf]) -> str:
    """Returns a did-you-mean: the path whose last segments are nearest to those of the glob."""
    words = [s for s in glob.split("/") if s != "**"]
    ends = {"/".join(leaf.path.split("/")[-len(words) :]): leaf.path for leaf in leaves}
    close = difflib.get_close_matches("/".join(words), ends, n=1, cutoff=0.4)
    return f" The nearest path is {ends[close[0]]!r}." if words and close else ""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PathRules:
    """Gives a leaf the spec of the first glob that matches its path.

    In a glob, `*` matches one segment of the path or any part of one, `**` any number of segments.
    A spec shorter than the leaf's rank leaves the other dims whole. A glob that matches no
    leaf is an error when the rules are resolved, since it is nearly always misspelt.

    Attributes:
      table: the globs with their specs, in order.
      allow_unmatched: a glob may match nothing, for tables that serve several models.

    >>> from jax.sharding import PartitionSpec as P
    >>> PathRules({"**/up/kernel": P(None, "tensor"), "**": Replicated()})
    PathRules({'**/up/kernel': P(None, 'tensor'), '**': REPLICATED})
    """

    table: tuple[tuple[str, PartitionSpec | Replicated], ...]
    allow_unmatched: bool

    def __init__(
        self, table: Mapping[str, PartitionSpec | Replicated], *, allow_unmatched: bool = False
    ) -> None:
        """Makes the rules of a table.

        Args:
          table: `{glob: PartitionSpec or REPLICATED}`, most specific first.
          allow_unmatched: whether a glob may match nothing.

        Raises:
          ShardingError: a glob is malformed or a value is not a spec.
        """
        headline = "PathRules has globs or values that are not legal."
        check_arguments(ShardingError, headline, "PathRules.", table=(table, Mapping[Any, Any]))
        problems = [
            Problem(f"PathRules[{glob!r}]", fault, 'globs look like "**/up/kernel", "layer_*/bias"')
            for glob in table
            if (fault := _find_fault(glob))
        ]
        problems += [
            Problem(
                f"PathRules[{glob!r}]",
                f"{spec!r} is not a PartitionSpec",
                f'{{"{glob}": P(None, "tensor")}}, or REPLICATED to replicate',
            )
            for glob, spec in table.items()
            if not isinstance(spec, PartitionSpec | Replicated)
        ]
        problems += option_problems("PathRules.", allow_unmatched=(allow_unmatched, bool))
        raise_all(ShardingError, headline, problems)
        object.__setattr__(self, "table", tuple(table.items()))
        object.__setattr__(self, "allow_unmatched", allow_unmatched)

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Gives the spec of the first glob that matches, or passes."""
        for glob, spec in self.table:
            if matches(glob, leaf.path):
                named = PartitionSpec() if isinstance(spec, Replicated) else spec
                return Decided(named, _format_source(glob), entries=(glob,))
        near = difflib.get_close_matches(leaf.path, [glob for glob, _ in self.table], 1, 0.3)
        nearest = f"the nearest is {near[0]!r}" if near else ""
        return Passed(f"PathRules: no glob of {len(self.table)} matches", nearest)

    def entries(self) -> tuple[Entry, ...]:
        """Lists the globs, each of which should match some leaf."""
        return tuple(
            Entry(
                key=glob,
                source=_format_source(glob),
                required=not self.allow_unmatched,
                matches=lambda leaf, glob=glob: matches(glob, leaf.path),
                nearest=functools.partial(_suggest_path, glob),
            )
            for glob, _ in self.table
        )

    def __repr__(self) -> str:
        rows = (
            f"{glob!r}: {spec if isinstance(spec, Replicated) else format_spec(spec)}"
            for glob, spec in self.table
        )
        tail = ", allow_unmatched=True" if self.allow_unmatched else ""
        return f"PathRules({{{', '.join(rows)}}}{tail})"


def _format_source(glob: str) -> str:
    return f'PathRules["{glob}"]'
