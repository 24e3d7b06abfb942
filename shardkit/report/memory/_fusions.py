"""What a fusion does with its parameters: which it writes into, passes on, or adds element-wise."""

from ..hlo._hlo import Computation, Instruction

SAME = frozenset({"bitcast", "opt-barrier", "domain", "add-dependency"})
INTO = frozenset({"dynamic-update-slice", "scatter"})
ELEMENTWISE = frozenset(
    """abs add and atan2 cbrt ceil clamp compare convert copy cosine divide erf exponential
    exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate
    not or power remainder round-nearest-even rsqrt select sign sine sqrt subtract tan tanh xor
    all-reduce""".split()
)
_FOLLOWED = ELEMENTWISE | SAME | {"tuple"}
_FORMS = frozenset({"bitcast", "broadcast", "convert", "copy", "reshape", "transpose"})


def written_parameter(inner: Computation, root: Instruction) -> int | None:
    """Number of the parameter that a fusion returns or writes its result into; None if none."""
    while root.opcode != "parameter":
        if root.opcode not in INTO | SAME:
            return None
        root = inner.instructions[root.operands[0]]
    return int(root.arguments)


def elementwise_parameters(inner: Computation) -> list[int]:
    """Numbers of the parameters that a fusion uses in element-wise operations only."""
    others = set[int]()
    reached = {parameter.name: {n} for n, parameter in inner.parameters.items()}
    for instruction in inner.instructions.values():
        used = set().union(*(reached[name] for name in instruction.operands if name in reached))
        if instruction.opcode in _FOLLOWED:
            reached[instruction.name] = used
        else:
            others |= used
    return [number for number in inner.parameters if number not in others]


def find_update(inner: Computation) -> Instruction | None:
    """What computes the value that a fusion writes into an array; None if it writes into none.

    A parameter, if that is computed outside of the fusion:

        %new = f32[8] tanh(%x)                                      found
        %row = f32[1,8] bitcast(%new)
        ROOT %stack = f32[4,8] dynamic-update-slice(%before, %row, %i, %zero)
    """
    root = inner.root
    while root is not None and root.opcode in SAME:
        root = inner.instructions.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return None
    update = inner.instructions[root.operands[1]]
    while update.opcode in _FORMS:
        update = inner.instructions[update.operands[0]]
    return update
