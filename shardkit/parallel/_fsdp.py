"""Fully sharded data parallelism (ZeRO-3): rows, weights, gradients and optimizer state split.

`x[B_fsdp, D] · W[D_fsdp, F] → y[B_fsdp, F]`, W gathered where it is used.

Collectives per step, n devices, W bytes of weights in compute dtype, G of gradients: gather
forward, gather backward, reduce-scatter of gradients: (n−1)/n · (2W + G) per device. Weights are
gathered layer by layer inside the scan over layers. With `reshard_after_forward=False` they are
kept from forward to backward: (n−1)/n · (W + G), and W more memory.

Use when weights, gradients and optimizer state do not fit, and the batch is large enough that
computing on it takes longer than gathering weights. Do not use across slow links for small
batches per device (`data` across them, `fsdp` inside).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, final

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.options import option_problems
from ..nn._constrain import constrain
from ..nn._overridable import Override, StepContext
from ..nn._remat import KEPT
from ..report import Program
from ..rules import first_match, shard_largest
from ._kind import Kind
from ._names import activations, check_axis, params
from ._strategy import Strategy


def fsdp_bytes(n: int, weights: float, gradients: float, gathers: int = 2) -> float:
    """Weights gathered for forward and, unless they are kept, for backward; gradients scattered.

    >>> fsdp_bytes(4, 1000, 1000), fsdp_bytes(4, 1000, 1000, gathers=1)
    (2250.0, 1500.0)
    """
    return (n - 1) / n * (gathers * weights + gradients)


@dataclasses.dataclass(frozen=True)
class KeptWeights(Override):
    """Gathers a weight where `sk.nn.use_param` marks it, under a name that every remat policy
    keeps.
    """

    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns the weight, whole over the axis."""
        x, names = args
        return checkpoint_name(_gathered(x, names), KEPT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The constraint holds for the weight alone: its gradient is to be scattered, not gathered."""
    return constrain(x, *names)


def _gathered_fwd(x: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return _gathered(x, names), None


_gathered.defvjp(_gathered_fwd, lambda names, _, g: (g,))


def fsdp(
    axis: str = "fsdp", min_size: int = 1024, *, reshard_after_forward: bool = True
) -> Strategy:
    """Splits rows, and every parameter over its `embed` dim, over one mesh axis.

    A model without logical names has each parameter split over the largest dim that the axis
    divides.

    Args:
      axis: name of the mesh
      axis.
      min_size: parameters of models without names that have fewer elements are replicated.
      reshard_after_forward: False keeps the weights that the model marks with `sk.nn.use_param` gathered
        from forward to backward, whatever the remat policy: one gather less, more memory.

    Returns:
      A strategy for any model.

    Raises:
      StepError: the axis is no name, or the size no number.

    >>> fsdp().batch
    P('fsdp',)
    """
    check_axis("fsdp", axis)
    if type(min_size) is not int or min_size < 0:
        problem = Problem(
            f"fsdp(min_size={min_size!r})", "is no number of elements", "min_size=1024"
        )
        raise_all(StepError, "A strategy is declared wrongly.", [problem])
    kept = option_problems("fsdp.", reshard_after_forward=(reshard_after_forward, bool))
    raise_all(StepError, "A strategy is declared wrongly.", kept)
    return Strategy(
        params=first_match(params({"embed": axis}), shard_largest(axis, min_size=min_size)),
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(Fsdp(axis, reshard_after_forward),),
        overrides=() if reshard_after_forward else (("use_param", KeptWeights(axis)),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Fsdp(Kind):
    """Rows and parameters over an axis.

    Attributes:
      reshard_after_forward: False keeps gathered weights from forward to backward.
    """

    name: ClassVar[str] = "fsdp"
    splits = frozenset({"rows", "weights"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    weighed = "fsdp"
    not_weighed = ("weights kept from forward to backward (reshard_after_forward=False)",)
    told_by = frozenset({"batch", "params"})
    make = staticmethod(fsdp)
    reshard_after_forward: bool = True

    @property
    def variant(self) -> str:
        """Whether weights are kept."""
        return "" if self.reshard_after_forward else "kept"

    def minimum(self, program: Program) -> float:
        """Rajbhandari et al. 2020 (ZeRO-3); what is not split is reduced as for `data`."""
        n, declared = program.sizes[self.axis], program.declared
        weights, gradients = (
            n * program.param_bytes(self.axis, dtype, split=True)
            for dtype in (declared.compute_dtype, declared.reduce_dtype)
        )
        gathers = 2 if self.reshard_after_forward else 1
        return self.reduced_bytes(program) + fsdp_bytes(n, weights, gradients, gathers)

    @property
    def unmodelled(self) -> str:
        """What is kept lives longer than a walk by names sees."""
        return "" if self.reshard_after_forward else "weights are kept"
