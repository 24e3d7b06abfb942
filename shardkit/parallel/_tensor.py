"""Tensor parallelism (Megatron): column- then row-split pairs of products.

`x[B, D] · W[D, F_tensor] → h[B, F_tensor] · V[F_tensor, D] → y[B, D]`, y summed over tensor.

Collectives per layer, n devices, A bytes of one `[batch, length, embed]` activation: two
all-reduces forward and two backward, 8(n−1)/n · A per device. With `sequence=True` norms and
residuals are split over length: the same bytes as all-gather and reduce-scatter, and 1/n of
the activations between blocks.

Use inside a fast domain (one host, one torus row), when the batch per device is too small for
more `fsdp`. Do not use across slow links: its collectives stand in the way of every layer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, final

from .._core.errors import Problem, StepError, did_you_mean, raise_all
from .._core.options import option_problems
from ..report import LedgerRow, Program
from ._kind import Choice, Kind
from ._names import activations, check_axis, params
from ._strategy import Strategy

KV_HEADS = ("split", "replicate")


def tensor_bytes(n: int, activation: float, layers: int) -> float:
    """Two column-row pairs per layer, each one all-reduce of A forward and one backward.

    With the residual split over length, each all-reduce becomes a gather and a scatter of the
    same bytes. A table of tokens and a head that are split over their vocabulary add one all-reduce
    forward and one backward: with L layers 1/(2L) of the minimum, 1.13 times it with 4 layers and
    1.02 times with 32.

    >>> tensor_bytes(4, 1000, 2)
    12000.0
    """
    return 8 * (n - 1) / n * activation * layers


def tensor(axis: str = "tensor", *, sequence: bool = False, kv_heads: str = "split") -> Strategy:
    """Splits heads, MLP width and vocabulary over a mesh axis.

    Args:
      axis: name of the mesh axis.
      sequence: split the residual stream between blocks over length on the same axis.
      kv_heads: `"split"` splits key and value heads as query heads, whose number must then be a
        multiple of the axis; `"replicate"` has every device make all key and value heads and use
        those of its own queries, for grouped queries with fewer groups than devices; in
        `mode="auto"` alone.

    Returns:
      A strategy for models that carry the conventional logical names.

    Raises:
      StepError: `kv_heads` is neither.

    >>> tensor(sequence=True).activations.spec(("batch", "residual_length", "embed"))
    P(None, 'tensor')
    """
    check_axis("tensor", axis)
    problems = option_problems("tensor.", sequence=(sequence, bool))
    raise_all(StepError, "A strategy is declared wrongly.", problems)
    if kv_heads not in KV_HEADS:
        why = f"known: {', '.join(KV_HEADS)}.{did_you_mean(str(kv_heads), KV_HEADS)}"
        problem = Problem(f"tensor(kv_heads={kv_heads!r})", why, 'kv_heads="replicate"')
        raise_all(StepError, "There is no such policy for key and value heads.", [problem])
    split = dict.fromkeys(("heads", "mlp", "expert_mlp", "vocab"), axis)
    split |= {"kv_heads": axis} if kv_heads == "split" else {}
    stream = {"residual_length": axis} if sequence else {}
    return Strategy(
        params=params(split),
        activations=activations({**split, **stream}),
        kinds=(Tensor(axis, sequence),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Tensor(Kind):
    """Products over an axis.

    Attributes:
      sequence: whether the stream between blocks is split over length.
    """

    name: ClassVar[str] = "tensor"
    splits = frozenset({"heads"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    weighed = "tensor with sequence"
    not_weighed = ("tensor without sequence",)
    make = staticmethod(tensor)
    sequence: bool = False

    @property
    def variant(self) -> str:
        """Whether the stream is split."""
        return "sequence" if self.sequence else ""

    @property
    def gathered_activations(self) -> frozenset[str]:
        """The stream between blocks."""
        return frozenset({"residual_length"}) if self.sequence else frozenset()

    @property
    def activation_fix(self) -> str:
        """What splits the stream."""
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
        """What is outside of the layers, and products whose gradients are not summed first."""
        # One that runs less often than there are layers stands outside of their loop.
        of_layers = (program.declared.layers or 1) * program.declared.accumulate
        if row.runs < of_layers and any(one.runs >= of_layers for one in rows):
            yield "outside of the layers, as embedding and loss", 1.0
            return
        left = 1.0
        if row.kind == "all-reduce" and row.phase == "backward":
            alike = max(map(row.operands.count, row.operands))
            left = 1 / alike
            if alike > 1:
                what = "of gradients reduced apart for each product that shares an input"
                yield what, 1 - left
        if row.kind == "all-reduce" and self.sequence:
            yield "all-reduced, where a reduce-scatter would do", left / 2

    def options(self, choice: Choice) -> dict[str, Any]:
        """The stream split."""
        return {"sequence": True}
