"""Reads phase and scope of an instruction from its JAX path.

`jit(step)/transpose(jvp(loss))/while/body/closed_call/checkpoint/mlp/dot_general` is a product
in the model's scope `mlp`, made by the backward pass. XLA writes several such paths into one
when it combines instructions: `a/b;a/c`, or `a/(b:c)`.
"""

import itertools
import re
from collections import Counter

from ..._core.scope_markers import BRANCH_COUNTS, MATRIX_OWNERS, RECOMPUTED

PHASES = ("forward", "backward", "recompute", "update", "other")

# The scopes that a step wraps its parts in name the phase and are not part of the model's scope.
_STEP_SCOPES = {"loss": "forward", "reduce": "backward", "grad_norm": "update", "update": "update"}
_PLUMBING = frozenset(
    """while body cond scan closed_call checkpoint remat remat2 eval_jaxpr
    shard_map pjit core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr branch
    custom_lin vmap pmap named_call call""".split()
)
_COMBINING = frozenset(
    """dot_general conv_general_dilated reduce sort top_k fft eigh eig svd qr lu cholesky
    triangular_solve householder_product ragged_dot""".split()
)
# Operations that compilers cut into steps, to hide permutes behind the pieces.
_WINDOWED = frozenset(
    "dot_general conv_general_dilated ragged_dot all_gather reduce_scatter psum_scatter".split()
)
_WRAPPER = re.compile(r"^(?:transpose|jvp|vmap|linearize|remat|checkpoint|shard_map)\((.*)\)$")
_MARKS = re.compile("[()/:]")
_SKIP = re.compile(r"^(?:jit|pjit|xla_call|pmap)\(|->|^branch_\d+_fun$|^$")


def phase_of(op_name: str) -> str:
    """Which part of a training step an instruction belongs to: one of `PHASES`.

    A combined instruction belongs to the phase of most of its paths.

    >>> phase_of("jit(step)/jvp(loss)/mlp/dot_general"), phase_of("jit(step)/update/mul")
    ('forward', 'update')
    >>> phase_of("jit(step)/(transpose(jvp(loss))/dot:transpose(jvp(loss))/add:jvp(loss)/sum)")
    'backward'
    """
    phases = Counter(_phase_of_path(path) for path in split_op_name(op_name))
    return phases.most_common(1)[0][0]


def scope_of(op_name: str) -> str:
    """The model's own `named_scope` path, without the parts that JAX and the step add.

    >>> scope_of("jit(step)/transpose(jvp(loss))/while/body/closed_call/checkpoint/mlp/dot_general")
    'mlp'
    >>> scope_of("jit(step)/jvp(loss)/layers/(attention/bld,dhk->blhk/dot_general:mlp/mul)")
    'layers/attention, layers/mlp'
    """
    return ", ".join(dict.fromkeys(filter(None, map(_scope_of_path, split_op_name(op_name)))))


def combines_elements(op_name: str) -> bool:
    """Whether an instruction comes from an operation that combines several elements per result.

    >>> combines_elements("jit(f)/vmap()/dot_general"), combines_elements("jit(f)/update/add")
    (True, False)
    """
    name = last_name(op_name)
    return name in _COMBINING or name.startswith(("reduce_", "arg", "cum"))


def moves_matrices(op_name: str) -> bool:
    """Whether an instruction moves matrices to or from their owners; see `step/owners`.

    >>> moves_matrices("jit(f)/update/shard_map/matrix_owners/all_to_all")
    True
    """
    return MATRIX_OWNERS in split_op_name(op_name)[0].split("/")


def is_windowable(op_name: str) -> bool:
    """Whether an instruction comes from a product, a gather or a scatter of the model.

    >>> is_windowable("jit(f)/mlp/dot_general"), is_windowable("jit(f)/mlp/concatenate")
    (True, False)
    """
    return last_name(op_name) in _WINDOWED


def last_name(op_name: str) -> str:
    """The operation at the end of a path; of a combined instruction, the first one.

    >>> last_name("jit(f)/(a/b:c);jit(f)/d")
    'b'
    """
    return split_op_name(op_name)[0].rpartition("/")[2]


def split_op_name(op_name: str) -> list[str]:
    """Splits the path of a combined instruction into single paths.

    >>> split_op_name("jit(f)/(a/b:c);jit(f)/d")
    ['jit(f)/a/b', 'jit(f)/c', 'jit(f)/d']
    """
    paths = []
    for path in op_name.split(";"):
        if not path.endswith(")"):
            paths.append(path)
            continue
        *head, last = _split_outside_parentheses(path, "/")
        if last.startswith("(") and last.endswith(")"):
            paths += [
                "/".join([*head, inner]) for inner in _split_outside_parentheses(last[1:-1], ":")
            ]
        else:
            paths.append(path)
    return paths


def _phase_of_path(path: str) -> str:
    if RECOMPUTED in path:
        return "recompute"
    if "transpose(" in path:
        return "backward"
    if "jvp(" in path:
        return "forward"
    return next((_STEP_SCOPES[p] for p in path.split("/") if p in _STEP_SCOPES), "other")


def _scope_of_path(path: str) -> str:
    names = []
    for part in _split_outside_parentheses(path, "/")[:-1]:
        while match := _WRAPPER.match(part):
            part = match.group(1)
        names += [name for name in part.split("/") if name not in _PLUMBING]
    names = [name for name in names if not (_SKIP.search(name) or BRANCH_COUNTS.fullmatch(name))]
    names = [name for name in names if not name.startswith(RECOMPUTED)]
    names = names[1:] if names and names[0] in _STEP_SCOPES else names
    # The backward rule of a custom derivative repeats the scope of its definition.
    return "/".join(name for name, _ in itertools.groupby(names))


def _split_outside_parentheses(path: str, mark: str) -> list[str]:
    """Splits a path at each `mark` outside of parentheses."""
    if "(" not in path and ")" not in path:
        return path.split(mark)
    parts, depth, start = [], 0, 0
    for match in _MARKS.finditer(path):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if match[0] == mark and depth == 0:
            parts.append(path[start : match.start()])
            start = match.end()
    return [*parts, path[start:]]
