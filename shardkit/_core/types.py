"""Types that models, losses and steps share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from .errors import Problem, StepError, raise_all
from .options import matches_annotation, option_problems
from .trainable import parse_trainable

PyTree: TypeAlias = Any
"""Any pytree of JAX, with arrays or abstract arrays as leaves."""

Params: TypeAlias = PyTree
"""The parameters of a model: a pytree of floating-point arrays."""

Batch: TypeAlias = PyTree
"""A batch: a pytree of arrays, of which most have rows, on dim 0 unless declared otherwise."""

Key: TypeAlias = jax.Array
"""A typed PRNG key[], as `jax.random.key` makes it."""

Trainable: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | PyTree | None"
"""Which parameters are trained: globs over their paths, a predicate of a path, or a tree of
booleans, of which one may stand for all below its path; None: all."""

Scalar: TypeAlias = jax.Array
"""An array without dims, such as a loss: f32[]."""

Metrics: TypeAlias = dict[str, Scalar]
"""Metrics of a step by name: `loss`, `grad_norm` and the user's own, f32[] each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean, `total / weight`, that is exact under any split of the batch.

    A loss that returns `Mean(sum of token losses, number of valid tokens)` has the same value
    under any accumulation and sharding, also if rows have different weights. A mean of means
    would not.

    Attributes:
      total: f32[], the weighted sum; gradients flow through it.
      weight: f32[] or an integer, the sum of weights. One that depends on the parameters is
        refused, unless its gradient is stopped. The mean is 0 if it is 0.
    """

    total: Scalar
    weight: Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithAxes:
    """An array with the logical axis names of its dims, as a leaf of what `init` returns.

    The loss gets the bare array. Functions over dicts name dims with it as flax modules do:
    `{"kernel": sk.WithAxes(kernel, ("embed", "mlp"))}`.

    Attributes:
      value: the array.
      axes: one logical axis name or None per dim; dims after the last one have no name.
    """

    value: Any
    axes: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


def has_axes(x: Any) -> bool:
    """Whether a leaf names its logical axes."""
    return isinstance(x, WithAxes)


def strip_axes(tree: PyTree) -> PyTree:
    """A pytree with the array of each leaf that names its logical axes."""
    return jax.tree.map(lambda x: x.value if has_axes(x) else x, tree, is_leaf=has_axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """What `init` returns for a model with mutable state.

    Attributes:
      params: pytree that the optimizer updates.
      model_state: pytree that the loss replaces each step (batch statistics, counters).
    """

    params: Params
    model_state: PyTree


@dataclasses.dataclass(frozen=True)
class Follows:
    """A parameter that is laid out like another one, whatever the rules say."""

    path: str  # of the parameter
    of: str  # path of the other one, which the rules decide
    # for each dim of the parameter, the dim of the other one that it is split like; None for a dim
    # that stays whole
    dims: tuple[int | None, ...]
    # what to do where its last dim has too few elements for this many shards; None for the usual
    fix: Callable[[int], str] | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that differs between training and evaluation, or has mutable state.

    Attributes:
      train: `(params, batch, key) -> loss`, or with state
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      evaluate: a function of the same signature, without dropout and with frozen statistics.
      stateful: whether both functions take and return `model_state`.
      trainable: the parameters that are trained, unless the spec says otherwise; see
        `sk.StepSpec.trainable`.
      follows: parameters that are laid out like others, such as the adapters of `sk.lora`.
    """

    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    stateful: bool = False
    trainable: Trainable = None
    follows: tuple[Follows, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", parse_trainable(self.trainable))
        problems = option_problems("Loss.", stateful=(self.stateful, bool))
        raise_all(StepError, "sk.Loss has a wrong option.", problems)

    def __call__(self, *args: Any) -> Any:
        """Calls `train`."""
        return self.train(*args)


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """How a step splits its batch into micro-batches, and when it reduces their gradients.

    Attributes:
      micro_batches: number k of micro-batches; micro-batch i holds rows i, i+k, i+2k, ….
      reduce: `"end"` reduces gradients over devices once, after the last micro-batch; each device
        holds one unreduced copy of the gradients until then. `"every"` reduces after every
        micro-batch: gradients stay as sharded as the parameters, and the statistics of a batch
        norm are those of the whole micro-batch.
    """

    micro_batches: int = 1
    reduce: str = "end"

    def __post_init__(self) -> None:
        problems = []
        if not matches_annotation(int, self.micro_batches) or self.micro_batches < 1:
            why = f"{self.micro_batches!r} is not a positive int"
            problems.append(Problem("micro_batches", why, "accumulate=sk.Accumulate(4)"))
        if self.reduce not in ("end", "every"):
            why = f"{self.reduce!r} is not 'end' or 'every'"
            problems.append(Problem("reduce", why, 'sk.Accumulate(4, reduce="end")'))
        raise_all(StepError, "sk.Accumulate has wrong options.", problems)
