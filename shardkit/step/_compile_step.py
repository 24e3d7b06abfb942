"""`compile_step`: `StepSpec(...).compile(mesh)` in one call."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax
from jax.sharding import Mesh

from .._core.precision import Precision
from .._core.types import Accumulate, Batch, Key, PyTree
from ..parallel import Strategy
from ._compiled import CompiledStep
from ._nonfinite import OnNonfinite
from ._spec import EVERYTHING_REPLICATED, Mode, OnRetrace, StepSpec

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def compile_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    init: Callable[[Key], PyTree],
    batch: Batch,
    mesh: Mesh,
    strategy: Strategy = EVERYTHING_REPLICATED,
    mode: Mode = "auto",
    accumulate: int | Accumulate | None = None,
    remat: str | None = None,
    precision: str | Precision | None = None,
    compiler_options: Mapping[str, Any] = _NO_OPTIONS,
    on_nonfinite: OnNonfinite = "apply",
    deterministic: bool = False,
    debug: bool = False,
    on_retrace: OnRetrace = "warn",
) -> CompiledStep:
    """Compiles one training step; the same as `StepSpec(...).compile(mesh)`.

    `mesh` comes from `MeshSpec.build`, all axes of type Auto. Every other argument is a field of
    `sk.StepSpec` and documented there.

    Returns:
      The compiled step.

    Raises:
      ShardingError, StepError: as `StepSpec` and its `compile` raise them.

    >>> import jax, jax.numpy as jnp, optax
    >>> from shardkit.mesh import MeshSpec
    >>> from shardkit.parallel import strategies
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> step = compile_step(
    ...     loss_fn, optax.sgd(0.1), init=lambda key: {"w": jax.random.normal(key, (4, 1))},
    ...     batch={"x": jnp.ones((8, 4)), "y": jnp.ones((8, 1))},
    ...     mesh=MeshSpec(data=1).build(devices=jax.devices()[:1]), strategy=strategies.data())
    >>> state = step.init(jax.random.key(0))
    >>> state, metrics = step(state, {"x": jnp.ones((8, 4)), "y": jnp.ones((8, 1))})
    >>> int(state.step), sorted(metrics)
    (1, ['grad_norm', 'loss'])
    """
    options = locals()
    return StepSpec(**{k: v for k, v in options.items() if k != "mesh"}).compile(mesh)
