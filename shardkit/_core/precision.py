"""Which dtype holds the parameters, which one computes, and which one is reduced."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .errors import Problem, StepError, did_you_mean, raise_all

_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Precision:
    """A dtype policy. Only floating-point leaves are ever cast; the batch is never touched.

    Attributes:
      param_dtype: dtype of `state.params` and of what the optimizer keeps.
      compute_dtype: dtype in which the loss sees the parameters. Feed inputs in this dtype, or cast
        them in the loss: an f32 input times a bf16 weight is an f32 product in JAX.
      reduce_dtype: dtype in which gradients are summed over the batch axes. None leaves it to the
        partitioner, which sums in `compute_dtype`; any other choice keeps gradients apart by lane
        until one reduction (see `docs/architecture.md`).
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
            "Precision names floating-point dtypes.",
            bad,
            'sk.Precision(param_dtype="float32", compute_dtype="bfloat16")',
        )

    @property
    def reduces_apart(self) -> bool:
        """Whether the reduction dtype differs from what the partitioner would use."""
        return self.reduce_dtype is not None and self.reduce_dtype != self.compute_dtype


_NAMED = {
    "float32": Precision(),
    "bfloat16": Precision(compute_dtype="bfloat16"),
    "pure_bfloat16": Precision(param_dtype="bfloat16", compute_dtype="bfloat16"),
}


def precision(named: "str | Precision") -> Precision:
    """Returns a policy by name: `float32`, `bfloat16` (f32 master weights), `pure_bfloat16`.

    >>> precision("bfloat16")
    Precision(param_dtype='float32', compute_dtype='bfloat16', reduce_dtype=None)
    """
    if isinstance(named, Precision):
        return named
    if named in _NAMED:
        return _NAMED[named]
    why = f"unknown policy; known: {', '.join(_NAMED)}." + did_you_mean(named, _NAMED)
    problem = Problem(f"precision={named!r}", why)
    raise_all(StepError, "No such precision.", [problem], 'precision="bfloat16"')
    raise AssertionError("unreachable")


def cast_floats(tree: Any, dtype: str) -> Any:
    """Casts the floating-point leaves of a pytree; integers, bools and keys stay."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)
