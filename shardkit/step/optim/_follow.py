"""Specs for the state of any optax chain, by path and shape.

Every optax transformation keeps trees that mirror the parameters somewhere below its own
fields: `0/mu/decoder/up/kernel`, `inner_states/matrices/inner_state/0/momentum/up/kernel`. So
a leaf of the state belongs to the parameter whose path ends the leaf's path, and its dims are
matched to that parameter's by shape.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from ..._core.tree import Leaf, path_to_glob
from ...rules import Decided, Decision, Entry, Passed, axes_of, spec_from_axes

# A coefficient table that no parameter explains (muon's polynomial, a schedule's knots) is
# replicated up to this many elements. Anything larger must be declared.
SMALL = 1024


def moment_spec(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec | None:
    """Spec of a state leaf whose dims are a parameter's, some of them dropped or collapsed.

    Covers moments (equal shape), factored moments (one dim dropped, as adafactor's rows and
    columns, or collapsed to 1) and placeholders (every dim collapsed to 1).

    Args:
      shape: of the state leaf.
      param_shape: of the parameter that it belongs to.
      spec: of that parameter.

    Returns:
      The spec, or None when the shape cannot be derived from the parameter's. Where several
      choices of dims give the same shape (a square matrix with one dim dropped), the one that
      keeps most dims sharded.

    >>> from jax.sharding import PartitionSpec as P
    >>> moment_spec((64,), (128, 64), P(None, "tensor"))
    P('tensor',)
    """
    entries = (*spec, *[None] * (len(param_shape) - len(spec)))
    if len(shape) == len(param_shape):
        pairs = list(zip(shape, param_shape, strict=True))
        if any(n not in (1, whole) for n, whole in pairs):
            return None
        kept = [e if n == whole else None for e, (n, whole) in zip(entries, pairs, strict=True)]
        return spec_from_axes(map(axes_of, kept))
    if all(size == 1 for size in shape):
        return PartitionSpec()
    choices = [
        [entries[dim] for dim in dims]
        for dims in itertools.combinations(range(len(param_shape)), len(shape))
        if tuple(param_shape[dim] for dim in dims) == shape
    ]
    if not choices:
        return None
    best = max(choices, key=lambda kept: sum(entry is not None for entry in kept))
    return PartitionSpec(*best)


@dataclasses.dataclass(frozen=True)
class FollowParams:
    """Rule for optimizer state: a leaf lives where the parameter that it belongs to lives.

    A leaf that no parameter explains passes, and so becomes an error: optimizer state is never
    silently replicated. Tables of at most `SMALL` elements are.

    Attributes:
      params: leaves of the parameters, each with its resolved spec.
      state: paths of all leaves of the optimizer's state, which tell a tree of moments from a
        parameter that happens to have the name of one (`mu/w` beside `w`).
    """

    params: tuple[tuple[Leaf, PartitionSpec], ...]
    state: frozenset[str] = frozenset()

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Derives the spec from the parameter whose path ends the leaf's path."""
        # A parameter of the very same shape explains a leaf better than one whose dims would have
        # to be dropped; then the reading under which most parameters have a leaf; then the longest.
        owners = sorted(
            self._owners(leaf.path),
            key=lambda owned: (owned[0].shape != leaf.shape, -self._siblings(leaf.path, owned[0])),
        )
        for owner, spec in owners:
            derived = moment_spec(leaf.shape, owner.shape, spec)
            if derived is not None:
                return Decided(derived, f"as its parameter {owner.path!r}")
        if math.prod(leaf.shape) <= SMALL:
            return Decided(PartitionSpec(), "a small table", why=f"at most {SMALL} elements")
        declare = (
            f'Strategy(opt_state=sk.PathRules({{"{path_to_glob(leaf.path)}": sk.REPLICATED}}))'
        )
        return Passed(f"no parameter explains it by path and shape; declare it: {declare}")

    def entries(self) -> tuple[Entry, ...]:
        """Nothing: a parameter need not have state."""
        return ()

    def _owners(self, path: str) -> list[tuple[Leaf, PartitionSpec]]:
        """Parameters whose path ends `path`, longest first; a bare array has the empty path."""
        by_path = {leaf.path: (leaf, spec) for leaf, spec in self.params}
        parts = path.split("/")
        suffixes = ["/".join(parts[i:]) for i in range(len(parts) + 1)]
        return [by_path[suffix] for suffix in suffixes if suffix in by_path]

    def _siblings(self, path: str, owner: Leaf) -> int:
        """How many parameters have a leaf where they would if `path` were that of `owner`."""
        above = path.removesuffix(owner.path)
        return sum(above + leaf.path in self.state for leaf, _ in self.params)
