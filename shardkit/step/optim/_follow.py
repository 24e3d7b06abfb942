"""Specs for the state of any optax chain, by path and shape.

Every optax transformation keeps trees like the parameters somewhere below its own fields:
`0/mu/decoder/up/kernel`, `inner_states/matrices/inner_state/0/momentum/up/kernel`. So a leaf of the
state belongs to the parameter whose path is a suffix of its own, and its dims are matched to that
parameter's by shape.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from ..._core.tree import Leaf, path_ends
from ...rules import Decided, Decision, Entry, Passed, axes_of, spec_from_axes

# Tables that belong to no parameter (muon's polynomial, a schedule's knots) are replicated up to
# this many elements. Larger ones must be declared.
SMALL = 1024


def moment_spec(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec | None:
    """Spec of a state leaf with the dims of a parameter, some of them dropped or of size 1.

    Covers moments (equal shape), factored moments (one dim dropped, as in adafactor, or of size 1),
    placeholders (every dim of size 1) and histories (dims in front, as in lbfgs). None if the shape
    cannot be derived from the parameter's. If several choices of dims give the shape (a square
    matrix with one dim dropped), it is the one that splits most dims.

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
    in_front = len(shape) - len(param_shape)
    if param_shape and in_front > 0 and shape[in_front:] == param_shape:
        return PartitionSpec(*[None] * in_front, *entries)
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
    """Rule for optimizer state: a leaf is laid out as its parameter.

    A leaf without a parameter passes, and so becomes an error: apart from tables of at most `SMALL`
    elements, optimizer state is never silently replicated.
    """

    # leaves of the parameters, each with its resolved spec
    params: tuple[tuple[Leaf, PartitionSpec], ...]
    # paths of all leaves of the optimizer state, which distinguish a tree of moments from a
    # parameter with the name of one (`mu/w` beside `w`)
    state: frozenset[str] = frozenset()

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Derives the spec from the parameter whose path is a suffix of the leaf's path."""
        # Of several such parameters prefer equal shape, then most siblings, then the longest path.
        # `0/mu/w` with parameters `w` and `mu/w`: if `0/mu` has leaves for both (`0/mu/mu/w`), the
        # leaf is the moment of `w`; read as `mu/w` below `0`, the parameter `w` would have none.
        owners = self._owners(leaf.path)
        if len(owners) > 1:
            owners.sort(key=lambda o: (o[0].shape != leaf.shape, -self._siblings(leaf.path, o[0])))
        for owner, spec in owners:
            derived = moment_spec(leaf.shape, owner.shape, spec)
            if derived is not None:
                return Decided(derived, f"as its parameter {owner.path!r}")
        if math.prod(leaf.shape) <= SMALL:
            return Decided(PartitionSpec(), "a small table", why=f"at most {SMALL} elements")
        return Passed("no parameter matches it by path and shape")

    def entries(self) -> tuple[Entry, ...]:
        """No entries, so that a parameter without state is not an unused rule."""
        return ()

    def _owners(self, path: str) -> list[tuple[Leaf, PartitionSpec]]:
        """Parameters whose path is a suffix of `path`, longest first."""
        return [self._by_path[end] for end in path_ends(path) if end in self._by_path]

    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[Leaf, PartitionSpec]]:
        return {leaf.path: (leaf, spec) for leaf, spec in self.params}

    def _siblings(self, path: str, owner: Leaf) -> int:
        """Number of parameters with a leaf in the same tree, if `path` is that of `owner`."""
        prefix = path.removesuffix(owner.path)
        return sum(prefix + leaf.path in self.state for leaf, _ in self.params)
