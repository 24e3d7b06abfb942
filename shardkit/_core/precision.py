"""`Precision`: the dtypes of parameters, of computation and of gradient reduction."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import Problem, StepError, did_you_mean, raise_all
from .tracing import SETTINGS
from .types import PyTree

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def dtype_name(value: Any) -> Any:
    """The name of a dtype or of a scalar type; any other value as it is.

    >>> dtype_name(jnp.bfloat16), dtype_name(np.dtype("float32")), dtype_name("bfloat16")
    ('bfloat16', 'float32', 'bfloat16')
    """
    is_scalar_type = isinstance(value, type(jnp.bfloat16)) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )
    return jnp.dtype(value).name if is_scalar_type or isinstance(value, np.dtype) else value


@dataclasses.dataclass(frozen=True)
class Precision:
    """A dtype policy. Only floating-point leaves of the parameters are cast, never the batch.

    Complex leaves are cast to the complex dtype of a policy's width: complex128 for float64, else
    complex64, as there is none for 16 bits. float64 needs `jax_enable_x64`.

    Attributes:
      param_dtype: dtype of `state.params` and of the optimizer state. None keeps every leaf in
        the dtype that `init` gives it, so a model may mix dtypes.
      compute_dtype: dtype in which the loss sees the parameters; None: as they are stored. Feed
        inputs in this dtype, or cast them in the loss: an f32 input times a bf16 weight is an f32
        product in JAX.
      reduce_dtype: dtype in which gradients are summed over the batch axes. None leaves it to the
        partitioner, which sums each in the dtype that its leaf is computed in. Another dtype keeps
        one gradient per gradient shard until a single reduction (see `docs/architecture.md`).
    """

    param_dtype: str | None = None
    compute_dtype: str | None = None
    reduce_dtype: str | None = None

    def __post_init__(self) -> None:
        """Takes dtypes such as `jnp.bfloat16` by their names, and refuses other values."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, dtype_name(value))
        bad = [
            Problem(
                f"precision.{name}",
                f"{value!r} is not None, nor one of {', '.join(_FLOATS)}."
                + did_you_mean(str(value), _FLOATS),
            )
            for name, value in dataclasses.asdict(self).items()
            if value not in (None, *_FLOATS)
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

    def compute_dtypes(self, params: PyTree) -> "ComputeDtypes":
        """The dtypes that the parameters of a step are computed in.

        Args:
          params: as stored, abstract or not.
        """
        sizes: collections.Counter[np.dtype] = collections.Counter()
        for x in jax.tree.leaves(params):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                dtype = policy_dtype(policy_dtype(x.dtype, self.param_dtype), self.compute_dtype)
                sizes[dtype] += max(x.size, 1)
        found = dict(sizes) or {jnp.dtype(self.compute_dtype or "float32"): 1}
        return ComputeDtypes(
            main=jnp.finfo(max(found, key=lambda dtype: found[dtype])).dtype.name,
            lowest=jnp.finfo(max(found, key=lambda dtype: jnp.finfo(dtype).eps)).dtype.name,
            only=next(iter(found)).name if len(found) == 1 else None,
        )


@dataclasses.dataclass(frozen=True)
class ComputeDtypes:
    """The dtypes that the parameters of a step are computed in."""

    # that of most elements of the parameters, which decides the rate of the products; a complex one
    # counts as that of its parts
    main: str
    lowest: str  # so that with the largest roundings, which decides how exact a result can be
    only: str | None  # the dtype of all parameters, complex as such; None if they have several


AS_INITIALIZED = Precision()
"""Every parameter keeps the dtype that `init` gives it, in storage and in computation."""

_NAMED = {
    "float32": Precision("float32", "float32"),
    "bfloat16": Precision("float32", "bfloat16"),
    "pure_bfloat16": Precision("bfloat16", "bfloat16"),
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
    raise StepError.of("Unknown precision.", f"precision={name!r}", why, 'precision="bfloat16"')


def policy_dtype(own: Any, dtype: str | None) -> np.dtype:
    """The dtype that a policy gives a leaf: integers, bools and keys keep their own.

    >>> [policy_dtype(jnp.dtype(own), "bfloat16").name for own in ("float32", "complex64", "int8")]
    ['bfloat16', 'complex64', 'int8']

    Raises:
      StepError: the policy asks for float64, which JAX would make float32.
    """
    if dtype is None or not jnp.issubdtype(own, jnp.inexact):
        return own
    x64 = SETTINGS.jax_enable_x64
    if dtype == "float64" and not x64:
        why = "JAX makes float64 arrays float32 unless jax_enable_x64 is set"
        fix = 'jax.config.update("jax_enable_x64", True), before the first array is made'
        raise_all(StepError, "float64 is not enabled.", [Problem("precision", why)], fix)
    if jnp.issubdtype(own, jnp.complexfloating):
        return jnp.dtype("complex128" if dtype == "float64" else "complex64")
    return jnp.dtype(dtype)


def cast_floats(tree: PyTree, dtype: str | None) -> PyTree:
    """Casts the floating-point leaves of a pytree as a policy says; None keeps each one's dtype."""

    def cast(x: Any) -> Any:
        wanted = policy_dtype(x.dtype, dtype)
        return x if x.dtype == wanted else x.astype(wanted)

    return jax.tree.map(cast, tree)


def widen(x: Any) -> Any:
    """An array in f32 or, if it is wider, in its own dtype: sums are made in at least f32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
