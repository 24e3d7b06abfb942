"""`Precision`: the dtypes of parameters, of computation and of gradient reduction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .errors import Problem, StepError, did_you_mean, format_problems, raise_all
from .types import PyTree

_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Precision:
    """A dtype policy. Only floating-point leaves of the parameters are cast, never the batch.

    Attributes:
      param_dtype: dtype of `state.params` and of the optimizer state.
      compute_dtype: dtype in which the loss sees the parameters. Feed inputs in this dtype, or cast
        them in the loss: an f32 input times a bf16 weight is an f32 product in JAX.
      reduce_dtype: dtype in which gradients are summed over the batch axes. None leaves it to the
        partitioner, which sums in `compute_dtype`. Another dtype keeps one gradient per gradient
        shard until a single reduction (see `docs/architecture.md`).
    """

    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    reduce_dtype: str | None = None

    def __post_init__(self) -> None:
        bad = [
            Problem(
                f"precision.{name}",
                f"{value!r} is not one of {', '.join(_FLOATS)}."
                + did_you_mean(str(value), _FLOATS),
            )
            for name, value in dataclasses.asdict(self).items()
            if value not in _FLOATS and not (name == "reduce_dtype" and value is None)
        ]
        raise_all(
            StepError,
            "Precision takes floating-point dtypes.",
            bad,
            'sk.Precision(param_dtype="float32", compute_dtype="bfloat16")',
        )

    @property
    def reduces_separately(self) -> bool:
        """Whether the reduction dtype differs from that of the partitioner."""
        return self.reduce_dtype is not None and self.reduce_dtype != self.compute_dtype


_NAMED = {
    "float32": Precision(),
    "bfloat16": Precision(compute_dtype="bfloat16"),
    "pure_bfloat16": Precision(param_dtype="bfloat16", compute_dtype="bfloat16"),
}


def parse_precision(name: "str | Precision") -> Precision:
    """Returns a policy by name: `float32`, `bfloat16` (f32 master weights), `pure_bfloat16`.

    >>> parse_precision("bfloat16")
    Precision(param_dtype='float32', compute_dtype='bfloat16', reduce_dtype=None)
    """
    if isinstance(name, Precision):
        return name
    if name in _NAMED:
        return _NAMED[name]
    why = f"unknown policy; known: {', '.join(_NAMED)}." + did_you_mean(name, _NAMED)
    problem = Problem(f"precision={name!r}", why)
    raise StepError(format_problems("Unknown precision.", [problem], 'precision="bfloat16"'))


def cast_floats(tree: PyTree, dtype: str) -> PyTree:
    """Casts the floating-point leaves of a pytree; integers, bools and keys stay."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)
