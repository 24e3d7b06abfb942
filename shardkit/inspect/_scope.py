"""Reads where an instruction came from out of its JAX path.

`jit(step)/transpose(jvp(loss))/while/body/closed_call/checkpoint/mlp/dot_general` is a product
in the model's scope `mlp`, made by the backward pass.
"""

import re

PHASES = ("forward", "backward", "recompute", "update", "other")

# The step wraps its two parts in these scopes; they are the phase, not part of the model.
_STEP_SCOPES = ("loss", "update")
_PLUMBING = frozenset(
    """while body cond scan closed_call checkpoint remat remat2 rematted_computation eval_jaxpr
    shard_map pjit core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr branch
    custom_lin vmap pmap named_call call""".split()
)
_WRAPPER = re.compile(r"^(?:transpose|jvp|vmap|linearize|remat|checkpoint|shard_map)\((.*)\)$")
_SKIP = re.compile(r"^(?:jit|pjit|xla_call|pmap)\(|->|^branch_\d+_fun$|^\(?\)?$")


def phase_of(op_name: str) -> str:
    """Which part of a training step an instruction belongs to: one of `PHASES`.

    >>> phase_of("jit(step)/jvp(loss)/mlp/dot_general"), phase_of("jit(step)/update/mul")
    ('forward', 'update')
    >>> phase_of("jit(step)/transpose(jvp(loss))/mlp/dot_general")
    'backward'
    """
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    parts = op_name.split("/")
    if "jvp(" in op_name or "loss" in parts:
        return "forward"
    return "update" if "update" in parts else "other"


def scope_of(op_name: str) -> str:
    """The model's own `named_scope` path, without what JAX and the step put around it.

    >>> scope_of("jit(step)/transpose(jvp(loss))/while/body/closed_call/checkpoint/mlp/dot_general")
    'mlp'
    >>> scope_of("jit(step)/jvp(loss)/layers/attention/bld,dhk->blhk/dot_general")
    'layers/attention'
    """
    names = []
    for part in _split(op_name.split(";")[0])[:-1]:
        while match := _WRAPPER.match(part):
            part = match.group(1)
        names += [name for name in part.split("/") if name not in _PLUMBING]
    names = [name for name in names if not _SKIP.search(name)]
    if names and names[0] in _STEP_SCOPES:
        names = names[1:]
    return "/".join(names)


def _split(path: str) -> list[str]:
    """Splits at the slashes outside of parentheses."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(path):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "/" and depth == 0:
            parts.append(path[start:at])
            start = at + 1
    return [*parts, path[start:]]
