"""FLOPs of a step from its jaxpr: trips multiplied through, recomputation apart, per scope.

XLA's own count sees the body of a loop once. The jaxpr has every loop's length and, in its name
stacks, which products a checkpoint computes a second time. Only products count (`dot_general`,
convolutions), two FLOPs per multiply-add: that is what model FLOPs and MFU are made of.
"""

import dataclasses
import fractions
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from ..._core.scope_markers import branch_shares, recomputed_share
from ..hlo._scope import phase_of, scope_of

# A branch's share of executions is a fraction, so that the sum of branches is exact.
Times = int | fractions.Fraction


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step, all devices together.

    Attributes:
      model: forward and backward pass, each product once.
      recompute: what checkpoints compute again.
      update: the optimizer's own products, which belong to no model.
      by_scope: `(scope, phase) → FLOPs`, largest first.
      problems: what could not be counted; with any, the numbers are lower bounds.
    """

    model: int
    recompute: int
    by_scope: Mapping[tuple[str, str], int]
    problems: tuple[str, ...] = ()
    update: int = 0

    @property
    def total(self) -> int:
        """All FLOPs that the devices together execute, if no device repeats another's work."""
        return self.model + self.recompute + self.update

    @property
    def complete(self) -> bool:
        """Every product was counted, with its trips."""
        return not self.problems


def count_flops(jaxpr: Any) -> Flops:
    """Counts the products of a closed jaxpr.

    >>> import jax, jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))).model
    60
    """
    problems: list[str] = []
    summed: dict[tuple[str, str], Times] = {}
    for path, flops in _products(jaxpr.jaxpr, "", 1, problems):
        # The last part of a path is the operation's own name, as in the compiled program.
        scope, phase = scope_of(path), phase_of(path)
        share = recomputed_share(path) if phase == "recompute" else 1
        for key, part in (((scope, phase), share), ((scope, "forward"), 1 - share)):
            if part:
                summed[key] = summed.get(key, 0) + flops * part
    found = {key: round(flops) for key, flops in summed.items()}
    again, update = (
        sum(flops for (_, phase), flops in found.items() if phase == one)
        for one in ("recompute", "update")
    )
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    model = sum(found.values()) - again - update
    return Flops(model, again, ordered, tuple(dict.fromkeys(problems)), update)


def _products(
    jaxpr: Any, path: str, times: Times, problems: list[str]
) -> Iterator[tuple[str, Times]]:
    """Yields (path, FLOPs) of every product, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        here = f"{path}/{stack}" if path and stack else path or stack
        name = eqn.primitive.name
        if name in _COUNTED:
            yield f"{here}/{name}", times * _COUNTED[name](eqn)
        elif name == "cond" and (often := _often(eqn, here)):
            for branch, share in zip(eqn.params["branches"], often, strict=True):
                yield from _products(branch.jaxpr, here, times * share, problems)
        elif name == "cond":
            yield from _largest(eqn, here, times, problems)
        else:
            for inner, trips in _inner(eqn, here, problems):
                yield from _products(inner, here, times * trips, problems)


def _often(eqn: Any, path: str) -> tuple[fractions.Fraction, ...] | None:
    return branch_shares(f"{path}/{eqn.primitive.name}", len(eqn.params["branches"]))


def _largest(eqn: Any, path: str, times: Times, problems: list[str]) -> list[tuple[str, Times]]:
    """Products of the branch with the most."""
    branches = [
        list(_products(branch.jaxpr, path, times, problems)) for branch in eqn.params["branches"]
    ]
    return max(branches, key=lambda found: sum(flops for _, flops in found))


def _inner(eqn: Any, path: str, problems: list[str]) -> Iterator[tuple[Any, int]]:
    """Jaxprs that an equation runs, and how often."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        body = params["body_jaxpr"].jaxpr
        if next(_products(body, path, 1, []), None):
            problems.append(
                f"a while loop in {scope_of(path + '/while') or 'the step'} runs "
                "products an unknown number of times; each is counted once"
            )
        yield body, 1
        return
    if name.startswith(_OPAQUE):
        problems.append(f"the kernel {name} in {scope_of(path + '/') or 'the step'} is not counted")
        return
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        # Its body is what one device of the manual axes does, be it the same on all of them.
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    for key, value in params.items():
        # The rules of custom derivatives are there besides the function itself.
        if key in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr, times
        elif isinstance(value, Jaxpr):
            yield value, times


def _dot(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contract)


def _convolution(eqn: Any) -> int:
    """Every output element is a product over the kernel's window and its input channels.

    Zeros that a dilated input (the backward pass of a stride) is filled up with do not count.
    """
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(eqn.params["lhs_dilation"])
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features // zeros


def _ragged(eqn: Any) -> int:
    """Every row meets one group's matrix."""
    rows, width = eqn.invars[0].aval.shape[-2:]
    return 2 * rows * width * eqn.outvars[0].aval.shape[-1]


# Kernels whose products no jaxpr shows.
_OPAQUE = ("pallas_call", "ffi_call", "dot_product_attention")

_COUNTED = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
}
