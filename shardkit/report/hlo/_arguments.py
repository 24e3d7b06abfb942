"""Traces an array back to the argument that it is a copy, cast, transpose, slice or gather of."""

from ._hlo import Computation, Module
from ._sources import SAME, Place, find_sources

_FORMS = SAME | frozenset(
    """transpose slice dynamic-slice all-gather all-gather-start all-gather-done
    collective-permute collective-permute-start collective-permute-done""".split()
)


def find_argument(module: Module, here: Computation, name: str) -> int | None:
    """The number of the argument that an array is another form, or a part, of.

    None if it is unknown, or one of several; raises ComputedError for a result of arithmetic. The
    state of a loop is its initial value, or what the body makes of it. A loop over layers passes
    their stack on, and slices one layer, perhaps the next one ahead: `all-gather(fusion(state[3],
    i)) → dynamic-slice(state[3]) → initial[3] → parameter(7)`.
    """
    arguments, visited = set[int | None](), set[Place]()
    pending = [Place(here.name, name)]
    while pending:
        place = pending.pop()
        if place in visited:
            continue
        visited.add(place)
        instruction = place.instruction(module)
        if instruction and instruction.opcode == "parameter" and place.computation == module.entry:
            arguments.add(int(instruction.arguments))
            continue
        sources = find_sources(module, place, _FORMS)
        arguments |= set() if sources else {None}
        pending += sources
    return arguments.pop() if len(arguments) == 1 else None
