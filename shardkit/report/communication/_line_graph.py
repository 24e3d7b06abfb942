"""`LineGraph`: how far two lines of a traced step are apart, along the arrays that pass them."""

import collections
from collections.abc import Hashable, Iterable

from jax.extend import core

from ..._core.equations import source_of_equation
from ..._core.source import Source

Line = tuple[str, int]


class LineGraph:
    """Lines of a traced step, next to each other where one reads what the other computes.

    Operations of no line of the user's, as those of the optimizer, are nodes of their own.
    """

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self._next: dict[Hashable, set[Hashable]] = collections.defaultdict(set)
        self._follow(jaxpr, {})
        self._known: dict[Line, dict[Hashable, int]] = {}

    def nearest(self, lines: Iterable[Source | None], of: Iterable[Source]) -> Source | None:
        """The one of some lines that is the least away from others, taken together; None of none.

        Of those that are equally near it is the first.
        """
        ends = [(one.file, one.line) for one in lines if one]
        far = len(self._next)

        def away(source: Source) -> int:
            distances = self.distances((source.file, source.line))
            return sum(distances.get(line, far) for line in ends)

        return min(of, key=away, default=None)

    def distances(self, start: Line) -> dict[Hashable, int]:
        """How many operations the lines that can be reached are away from one."""
        if start not in self._known:
            self._known[start] = self._search(start)
        return self._known[start]

    def _search(self, start: Line) -> dict[Hashable, int]:
        distances: dict[Hashable, int] = {start: 0}
        waiting = collections.deque[Hashable]([start])
        while waiting:
            node = waiting.popleft()
            for other in self._next[node] - distances.keys():
                distances[other] = distances[node] + 1
                waiting.append(other)
        return distances

    def _follow(self, jaxpr: core.Jaxpr, made: dict[core.Var, Hashable]) -> None:
        """Adds the operations of a jaxpr; `made` has the nodes that compute its arrays."""
        for eqn in jaxpr.eqns:
            bodies = list(core.jaxprs_in_params(eqn.params))
            for body in bodies:
                outside = zip(reversed(eqn.invars), reversed(body.invars), strict=False)
                inner = {
                    v: made[one]
                    for one, v in outside
                    if not isinstance(one, core.Literal) and one in made
                }
                self._follow(body, inner)
                results = zip(reversed(eqn.outvars), reversed(body.outvars), strict=False)
                made |= {v: inner[one] for v, one in results if one in inner}
            source = source_of_equation(eqn)
            node = (source.file, source.line) if source else id(eqn)
            for value in () if bodies else eqn.invars:
                if not isinstance(value, core.Literal) and value in made:
                    self._next[node].add(made[value])
                    self._next[made[value]].add(node)
            made |= dict.fromkeys(() if bodies else eqn.outvars, node)
