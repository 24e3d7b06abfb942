"""Fully sharded data parallelism (ZeRO-3): splits rows, weights, gradients and optimizer state.

`x[B_fsdp, D] · W[D_fsdp, F] → y[B_fsdp, F]`, W gathered where it is used.

Collectives per step, n devices, W bytes of weights in compute dtype, G of gradients: gather
forward, gather backward, reduce-scatter of gradients: (n−1)/n · (2W + G) per device. Weights are
gathered layer by layer inside the scan over layers. With `reshard_after_forward=False` they are
kept from forward to backward: (n−1)/n · (W + G), and W more memory. A frozen weight has no G, so it
is never scattered. The backward pass gathers it again if it recomputes its products, or if
something below is trained: the gradient of its input needs it. Otherwise it is gathered once.

Use when weights, gradients and optimizer state do not fit on one device, and the batch is large
enough that computing on it takes longer than gathering weights. Do not use across slow links with
small batches per device (use `data` across them, `fsdp` inside).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, final

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from .._core.errors import Problem
from .._core.options import option_problems
from ..nn._constrain import constrain
from ..nn._overridable import Override, StepContext
from ..nn._remat import KEPT_PARAM
from ..report import Program
from ..rules import first_match, shard_largest
from ._kind import Kind
from ._names import activations, check_strategy, params
from ._strategy import Strategy


def fsdp_bytes(n: int, forward: float, backward: float, gradients: float) -> float:
    """Bytes per device: of weights that either pass gathers, and of gradients that are scattered.

    >>> fsdp_bytes(4, 1000, 1000, 1000), fsdp_bytes(4, 1000, 0, 1000)
    (2250.0, 1500.0)
    """
    return (n - 1) / n * (forward + backward + gradients)


@dataclasses.dataclass(frozen=True)
class KeptParams(Override):
    """Gathers a parameter at its `sk.nn.use_param`, under a name that every remat policy keeps."""

    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns the parameter, whole over the axis."""
        x, names = args
        return checkpoint_name(_gather(x, names), KEPT_PARAM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Constrains the parameter, not its gradient, which is to be scattered."""
    return constrain(x, *names)


def _gather_fwd(x: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return _gather(x, names), None


_gather.defvjp(_gather_fwd, lambda names, _, g: (g,))


def fsdp(
    axis: str = "fsdp", min_size: int = 1024, *, reshard_after_forward: bool = True
) -> Strategy:
    """Splits rows, and every parameter over its `embed` dim, over one mesh axis.

    In a model without logical names, each parameter is split over the largest dim that the axis
    divides.

    Args:
      axis: name of the mesh axis.
      min_size: parameters of models without names that have fewer elements are replicated.
      reshard_after_forward: False keeps the parameters that the model passes to `sk.nn.use_param`
        gathered from forward to backward, whatever the remat policy: one gather less, more memory.

    Returns:
      A strategy for any model.

    Raises:
      StepError: an option is not of its type.

    >>> fsdp().batch
    P('fsdp',)
    """
    problems = option_problems(reshard_after_forward=(reshard_after_forward, bool))
    if type(min_size) is not int or min_size < 0:
        why = "is not a number of elements"
        problems.append(Problem(f"min_size={min_size!r}", why, "min_size=1024"))
    check_strategy("fsdp", axis, problems)
    return Strategy(
        params=first_match(params({"embed": axis}), shard_largest(axis, min_size=min_size)),
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(Fsdp(axis, reshard_after_forward),),
        overrides=() if reshard_after_forward else (("use_param", KeptParams(axis)),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Fsdp(Kind):
    """Rows and parameters split over an axis."""

    name: ClassVar[str] = "fsdp"
    splits = frozenset({"rows", "weights"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    planned = "fsdp"
    not_planned = ("weights kept from forward to backward (reshard_after_forward=False)",)
    implied_by = frozenset({"batch", "params"})
    factory = staticmethod(fsdp)
    reshard_after_forward: bool = True  # False keeps gathered weights from forward to backward

    @property
    def variant(self) -> str:
        """`kept` where weights stay gathered from forward to backward."""
        return "" if self.reshard_after_forward else "kept"

    def minimum(self, program: Program) -> float:
        """Rajbhandari et al. 2020 (ZeRO-3); gradients of unsplit parameters as for `data`."""
        n, declared = program.sizes[self.axis], program.declared
        size = functools.partial(program.param_bytes, self.axis, split=True)
        weights, gradients = size(declared.compute_dtype), size(declared.reduce_dtype, trained=True)
        again = size(declared.compute_dtype, backward=True) if self.reshard_after_forward else 0
        sent = fsdp_bytes(n, n * weights, n * again, n * gradients)
        return self.gradient_all_reduce_bytes(program) + sent

    @property
    def unmodelled_reason(self) -> str:
        """The planner's memory estimate frees gathered weights after each layer."""
        return "" if self.reshard_after_forward else "weights are kept"
