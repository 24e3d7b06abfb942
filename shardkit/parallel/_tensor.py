"""Tensor parallelism (Megatron): column- then row-split pairs of products.

`x[B, D] · W[D, F_tensor] → h[B, F_tensor] · V[F_tensor, D] → y[B, D]`, y summed over tensor.

Collectives per layer, n devices, A bytes of one `[batch, length, embed]` activation: two
all-reduces forward and two backward, 8(n−1)/n · A per device. With `sequence=True` norms and
residuals are split over length: the same bytes as all-gather and reduce-scatter, and 1/n of
the activations between blocks.

Use inside a fast domain (one host, one torus row), when the batch per device is too small for
more `fsdp`. Do not use across slow links: every layer waits for its collectives.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, final

from .._core.options import option_problems
from ..report import LedgerRow, Program
from ._kind import Kind, PlanChoice
from ._names import activations, check_strategy, choice_problems, params
from ._strategy import Strategy


def tensor_bytes(n: int, activation: float, layers: int) -> float:
    """Bytes per device: two column-row pairs per layer, each one all-reduce of A in each pass.

    With the residual stream split over length, each all-reduce becomes a gather and a scatter of
    the same bytes. A token table and a head that are split over their vocabulary add one all-reduce
    forward and one backward: with L layers 1/(2L) of the minimum, so 1.13 times it with 4 layers
    and 1.02 times with 32.

    >>> tensor_bytes(4, 1000, 2)
    12000.0
    """
    return 8 * (n - 1) / n * activation * layers


def tensor(axis: str = "tensor", *, sequence: bool = False, kv_heads: str = "split") -> Strategy:
    """Splits heads, MLP width and vocabulary over a mesh axis.

    Args:
      axis: name of the mesh axis.
      sequence: split the residual stream between blocks over length on the same axis.
      kv_heads: `"split"` splits key and value heads like query heads, so their number must be a
        multiple of the axis; with `"replicate"` every device computes all key and value heads and
        uses those of its own queries, for grouped queries with fewer groups than devices (only in
        `mode="auto"`).

    Returns:
      A strategy for models with the conventional logical names; see `Strategy.rename`.

    Raises:
      StepError: an option is none of these.

    >>> tensor(sequence=True).activations.spec(("batch", "residual_length", "embed"))
    P(None, 'tensor')
    """
    problems = option_problems(sequence=(sequence, bool))
    problems += choice_problems(kv_heads=(kv_heads, ("split", "replicate")))
    check_strategy("tensor", axis, problems)
    names = ["heads", "mlp", "expert_mlp", "vocab"]
    if kv_heads == "split":
        names.append("kv_heads")
    split = dict.fromkeys(names, axis)
    return Strategy(
        params=params(split),
        activations=activations({**split, "residual_length": axis if sequence else None}),
        kinds=(Tensor(axis, sequence),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Tensor(Kind):
    """Heads, MLP width and vocabulary split over an axis."""

    name: ClassVar[str] = "tensor"
    splits = frozenset({"heads"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    planned = "tensor with sequence"
    not_planned = ("tensor without sequence",)
    factory = staticmethod(tensor)
    sequence: bool = False  # whether the residual stream between blocks is split over length

    @property
    def variant(self) -> str:
        """`sequence` where the residual stream is split."""
        return "sequence" if self.sequence else ""

    @property
    def gathered_activations(self) -> frozenset[str]:
        """The residual stream, if it is split."""
        return frozenset({"residual_length"}) if self.sequence else frozenset()

    @property
    def activation_fix(self) -> str:
        """The option that splits the residual stream."""
        return "" if self.sequence else "strategies.tensor(sequence=True)"

    def minimum(self, program: Program) -> float | None:
        """Shoeybi et al. 2019, Korthikanti et al. 2022."""
        activation, layers = program.declared.activation_bytes, program.layers
        if activation is None or layers is None:
            return None
        return tensor_bytes(program.sizes[self.axis], activation, layers)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """Bytes outside the layers, and products whose gradients are not added before the sum."""
        # A collective that runs less often than there are layers is outside their loop.
        in_layers = (program.declared.layers or 1) * program.declared.accumulate
        if row.runs < in_layers and any(other.runs >= in_layers for other in rows):
            yield "outside the layers, as for embedding and loss", 1.0
            return
        # Three products that share an input, as q, k and v do, reduce three arrays of one shape
        # where one sum would do: 2/3 of the row is excess, and `left` is the other third.
        left = 1.0
        if row.kind == "all-reduce" and row.phase == "backward":
            equal = max(map(row.operands.count, row.operands))
            left = 1 / equal
            if equal > 1:
                why = "of gradients reduced separately for each product that shares an input"
                yield why, 1 - left
        larger = self._larger_share(row, program)
        if larger:
            yield (
                "of arrays larger than an activation, as tokens for several experts",
                left * larger,
            )
            left *= 1 - larger
        if row.kind == "all-reduce" and self.sequence:
            yield "all-reduced, where a reduce-scatter would do", left / 2

    def _larger_share(self, row: LedgerRow, program: Program) -> float:
        """The share of a row beyond one activation for each of its arrays."""
        activation = program.declared.activation_bytes or math.inf
        most = len(row.operands) * activation / program.declared.accumulate
        return max(0.0, 1 - most / row.payload_bytes) if row.kind == "all-reduce" else 0.0

    def planned_options(self, choice: PlanChoice) -> dict[str, Any]:
        """With the residual stream split."""
        return {"sequence": True}
