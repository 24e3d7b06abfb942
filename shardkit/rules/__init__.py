"""Rules that give every leaf of a pytree its spec, checked all at once."""

from ._axes import AxisRules
from ._check import Indivisible, check_batch, check_spec
from ._explain import Explanation, explain_rules, named_leaves
from ._path import PathRules, matches
from ._resolve import Placement, check, collect, headline, place, resolve
from ._rule import (
    REPLICATED,
    Chain,
    Decided,
    Decision,
    Entry,
    Passed,
    Refused,
    Rule,
    first_match,
    flatten,
)
from ._shape import ShardLargest, shard_largest
from ._specs import (
    axes_of,
    format_mesh,
    format_spec,
    from_axes,
    mesh_sizes,
    normalise,
    shards,
    ways,
)
from ._unused import Dead, dead

__all__ = [
    "REPLICATED",
    "AxisRules",
    "Chain",
    "Dead",
    "Decided",
    "Decision",
    "Entry",
    "Explanation",
    "Indivisible",
    "Passed",
    "PathRules",
    "Placement",
    "Refused",
    "Rule",
    "ShardLargest",
    "axes_of",
    "check",
    "check_batch",
    "check_spec",
    "collect",
    "dead",
    "explain_rules",
    "first_match",
    "flatten",
    "format_mesh",
    "format_spec",
    "from_axes",
    "headline",
    "matches",
    "mesh_sizes",
    "named_leaves",
    "normalise",
    "place",
    "resolve",
    "shard_largest",
    "shards",
    "ways",
]
