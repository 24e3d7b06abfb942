"""The small vocabulary that models, losses and steps share."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from .errors import Problem, StepError, raise_all
from .options import option_problems

PyTree: TypeAlias = Any
"""Any tree of JAX: nested containers with arrays, or what stands for arrays, as leaves."""

Params: TypeAlias = PyTree
"""The parameters of a model: a pytree of floating-point arrays."""

Batch: TypeAlias = PyTree
"""A batch: a pytree of arrays whose dim 0 counts rows."""

Key: TypeAlias = jax.Array
"""A typed PRNG key[], as `jax.random.key` makes it."""

Scalar: TypeAlias = jax.Array
"""An array without dims, such as a loss: f32[]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean that stays exact when it is split: `total / weight`.

    A loss that returns `Mean(sum of token losses, number of valid tokens)` is the same number
    under any accumulation and any sharding, also when examples weigh differently. A mean of
    means would not be.

    Attributes:
      total: f32[], the weighted sum; gradients flow through it.
      weight: f32[], the sum of weights; treated as a constant. A mean of no weight is 0.
    """

    total: Any
    weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithAxes:
    """An array with the logical axis names of its dims, as `init` may return it.

    `compile_step` reads the names and hands the bare array to the loss, so that a plain
    function over dicts can name its dims as flax modules do:
    `{"kernel": sk.WithAxes(kernel, ("embed", "mlp"))}`.

    Attributes:
      value: the array.
      axes: one logical axis name or None per dim.
    """

    value: Any
    axes: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """What `init` returns for a model with mutable state: parameters, and the rest.

    Attributes:
      params: pytree that the optimizer updates.
      model_state: pytree that the loss replaces each step (batch statistics, counters).
    """

    params: Any
    model_state: Any


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that behaves differently in training and in evaluation, or carries state.

    Attributes:
      train: `(params, batch, key) -> loss`, or with state
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      evaluate: the same signature, without dropout and with frozen statistics.
      stateful: whether both take and return `model_state`.
    """

    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    stateful: bool = False

    def __post_init__(self) -> None:
        problems = option_problems("Loss.", stateful=(self.stateful, bool))
        raise_all(StepError, "The loss is declared wrongly.", problems)

    def __call__(self, *args: Any) -> Any:
        """Calls the training form."""
        return self.train(*args)


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """How a step splits its batch into micro-batches, and when it reduces their gradients.

    Attributes:
      micro_batches: number of micro-batches; micro-batch i holds rows i, i+steps, i+2·steps, ….
      reduce: `"end"` keeps each device's gradients apart until one reduction after the last
        micro-batch (costs one unreduced copy of the gradients on each device); `"every"` reduces
        after every micro-batch (gradients stay as sharded as the parameters, and statistics of
        a batch norm are those of the whole micro-batch).
    """

    micro_batches: int = 1
    reduce: str = "end"

    def __post_init__(self) -> None:
        bad = []
        if (
            not isinstance(self.micro_batches, int)
            or isinstance(self.micro_batches, bool)
            or self.micro_batches < 1
        ):
            bad.append(Problem("accumulate", f"{self.micro_batches!r} is not a positive int"))
        if self.reduce not in ("end", "every"):
            bad.append(Problem("reduce", f"{self.reduce!r} is not 'once' or 'each'"))
        raise_all(StepError, "Accumulation is declared wrongly.", bad, "accumulate=4")
