"""Rules that give every leaf of a pytree its spec, checked all at once."""

from ._axes import AxisRules, UnlistedAxis
from ._check import Indivisible, check_batch, check_spec
from ._explain import Explanation, explain_rules, list_named_leaves
from ._path import PathRules, matches, selects
from ._resolve import Placement, format_headline, list_ruled, place_leaf, resolve, resolve_all
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
    list_rules,
)
from ._shape import ShardLargest, shard_largest
from ._specs import (
    axes_of,
    count_shards,
    format_mesh,
    format_spec,
    mesh_sizes,
    normalize_spec,
    shard_count,
    spec_from_axes,
)
from ._unused import DeadEntry, find_dead_entries

__all__ = [
    "REPLICATED",
    "AxisRules",
    "Chain",
    "DeadEntry",
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
    "UnlistedAxis",
    "axes_of",
    "check_batch",
    "check_spec",
    "count_shards",
    "explain_rules",
    "find_dead_entries",
    "first_match",
    "format_headline",
    "format_mesh",
    "format_spec",
    "list_named_leaves",
    "list_ruled",
    "list_rules",
    "matches",
    "mesh_sizes",
    "normalize_spec",
    "place_leaf",
    "resolve",
    "resolve_all",
    "selects",
    "shard_count",
    "shard_largest",
    "spec_from_axes",
]
