"""Counts the FLOPs of a step from its jaxpr, per scope, with recomputation apart.

XLA's own count has the body of a loop once. The jaxpr has the length of each scan and, in its name
stacks, the products that a checkpoint recomputes. Only products count (`dot_general`,
convolutions), two FLOPs per multiply-add, as in the definition of MFU.
"""

import dataclasses
import fractions
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from ..._core.equations import source_of_equation
from ..._core.scope_markers import branch_shares, recomputed_share
from ..._core.source import Source
from ..hlo._scope import phase_of, scope_of

# Shares of branches are fractions, so that the sum over branches is exact.
Times = int | fractions.Fraction


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step, all devices together.

    Attributes:
      model: forward and backward pass, each product once.
      recompute: products that checkpoints recompute.
      update: products of the optimizer, which are not model FLOPs.
      by_scope: `(scope, phase) → FLOPs`, largest first.
      by_source: (line of the user's code, FLOPs), largest first; None for the line of products
        without one.
      lines: of each entry of `by_scope` the line of its largest product; None if unknown.
      problems: products that could not be counted; with any, the numbers are lower bounds.
    """

    model: int
    recompute: int
    by_scope: Mapping[tuple[str, str], int]
    problems: tuple[str, ...] = ()
    update: int = 0
    by_source: tuple[tuple[Source | None, int], ...] = ()
    lines: tuple[Source | None, ...] = ()

    @property
    def total(self) -> int:
        """FLOPs of all devices together, if none repeats another's work."""
        return self.model + self.recompute + self.update

    @property
    def complete(self) -> bool:
        """Every product is counted, with its trips."""
        return not self.problems


def count_flops(jaxpr: ClosedJaxpr) -> Flops:
    """Counts the products of a closed jaxpr.

    >>> import jax, jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))).model
    60
    """
    problems: list[str] = []
    summed: dict[tuple[str, str], Times] = {}
    lines: dict[tuple[str, int], tuple[Source | None, Times]] = {}
    largest: dict[tuple[str, str], tuple[Times, Source | None]] = {}
    # A derivative rule computes the gradients of frozen weights too; compilers remove them.
    live, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    for path, equation, flops in _products(live, "", 1, problems):
        source = source_of_equation(equation)
        line = (source.file, source.line) if source else ("", 0)
        first, sum_before = lines.get(line, (source, 0))
        lines[line] = first, sum_before + flops
        # As in the compiled program, the last part of a path is the operation.
        scope, phase = scope_of(path), phase_of(path)
        share = recomputed_share(path) if phase == "recompute" else 1
        for key, part in (((scope, phase), share), ((scope, "forward"), 1 - share)):
            if part:
                summed[key] = summed.get(key, 0) + flops * part
                if flops * part > largest.get(key, (0, None))[0]:
                    largest[key] = flops * part, source
    by_scope = {key: round(flops) for key, flops in summed.items()}
    by_phase = Counter[str]()
    for (_, phase), flops in by_scope.items():
        by_phase[phase] += flops
    recompute, update = by_phase["recompute"], by_phase["update"]
    by_scope = dict(sorted(by_scope.items(), key=lambda item: -item[1]))
    return Flops(
        model=by_phase.total() - recompute - update,
        recompute=recompute,
        by_scope=by_scope,
        problems=tuple(dict.fromkeys(problems)),
        update=update,
        by_source=tuple(
            sorted(((s, round(n)) for s, n in lines.values()), key=lambda line: -line[1])
        ),
        lines=tuple(largest.get(key, (0, None))[1] for key in by_scope),
    )


def _products(
    jaxpr: Jaxpr, path: str, times: Times, problems: list[str]
) -> Iterator[tuple[str, JaxprEqn, Times]]:
    """Yields (path, equation, FLOPs) of every product, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        here = f"{path}/{stack}" if path and stack else path or stack
        name = eqn.primitive.name
        if name in _COUNTED:
            yield f"{here}/{name}", eqn, times * _COUNTED[name](eqn)
        elif name == "cond" and (shares := _branch_shares(eqn, here)):
            for branch, share in zip(eqn.params["branches"], shares, strict=True):
                yield from _products(branch.jaxpr, here, times * share, problems)
        elif name == "cond":
            yield from _largest_branch(eqn, here, times, problems)
        else:
            for inner, trips in _inner_jaxprs(eqn, here, problems):
                yield from _products(inner, here, times * trips, problems)


def _branch_shares(eqn: JaxprEqn, path: str) -> tuple[fractions.Fraction, ...] | None:
    return branch_shares(f"{path}/{eqn.primitive.name}", len(eqn.params["branches"]))


def _largest_branch(
    eqn: JaxprEqn, path: str, times: Times, problems: list[str]
) -> list[tuple[str, JaxprEqn, Times]]:
    """Products of the branch that has the most FLOPs."""
    branches = [
        list(_products(branch.jaxpr, path, times, problems)) for branch in eqn.params["branches"]
    ]
    return max(branches, key=lambda products: sum(flops for *_, flops in products))


def _inner_jaxprs(eqn: JaxprEqn, path: str, problems: list[str]) -> Iterator[tuple[Jaxpr, int]]:
    """Jaxprs that an equation runs, with their trips."""
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
        # The body is the work of one device along the manual axes.
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    for key, value in params.items():
        # An equation with custom derivatives has their rules besides the function itself.
        if key in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr, times
        elif isinstance(value, Jaxpr):
            yield value, times


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _dot_flops(eqn: JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = _shape(eqn.invars[0])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[d] for d in contract)


def _convolution_flops(eqn: JaxprEqn) -> int:
    """FLOPs of a convolution: each output element sums over the window and the input channels.

    The zeros in a dilated input (the backward pass of a stride) do not count.
    """
    kernel = _shape(eqn.invars[1])
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(eqn.params["lhs_dilation"])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // features // zeros


def _ragged_flops(eqn: JaxprEqn) -> int:
    """FLOPs of a ragged dot: each row is multiplied with the matrix of one group."""
    rows, width = _shape(eqn.invars[0])[-2:]
    return 2 * rows * width * _shape(eqn.outvars[0])[-1]


# Kernels whose products are not in the jaxpr.
_OPAQUE = ("pallas_call", "ffi_call", "dot_product_attention")

_COUNTED = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _convolution_flops,
    "ragged_dot_general": _ragged_flops,
}
