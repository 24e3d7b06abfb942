"""`compile_step`: from what a user declares to a `CompiledStep`."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.sharding import Mesh

from .._precision import Precision
from .._types import Accumulate
from ..parallel import Strategy
from ._compiled import CompiledStep
from ._declaration import OnRetrace, declare
from ._nonfinite import OnNonfinite


def compile_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    init: Callable[[Any], Any],
    batch: Any,
    mesh: Mesh,
    strategy: Strategy | None = None,
    mode: str = "auto",
    accumulate: int | Accumulate | None = None,
    remat: str | None = None,
    precision: str | Precision | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    on_nonfinite: OnNonfinite = "apply",
    deterministic: bool = False,
    debug: bool = False,
    on_retrace: OnRetrace = "warn",
) -> CompiledStep:
    """Compiles one training step for one mesh, and checks that it is what was declared.

    Args:
      loss_fn: `(params, batch, key) -> loss`. A loss is a floating-point scalar (a mean over
        equal-sized examples) or `sk.Mean(total, weight)`, alone or as `(loss, metrics)` with a
        dict of scalars or `sk.Mean`s. Plain scalars, the loss among them, are averaged over
        micro-batches; what is a sum or a count belongs into an `sk.Mean`. A model with mutable
        state is an `sk.Loss`.
      optimizer: any optax chain.
      init: `key -> params`, any pytree of floating-point arrays, some of them perhaps `sk.Named`;
        or `key -> sk.Variables(params, extra)`.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, global shapes; dim 0 counts rows.
      mesh: from `MeshSpec.build`, all axes of type Auto.
      strategy: the layout; by default everything is replicated.
      mode: `"auto"`: the partitioner places the collectives. `"shard_map"`: the loss and its
        gradients run on shards with explicit ones, for data, fsdp and tensor parallelism; the loss
        sees one device's rows, whole arrays otherwise, or is an `sk.PerShard`.
      accumulate: overrides `strategy.accumulate`.
      remat: overrides `strategy.remat`.
      precision: overrides `strategy.precision`.
      compiler_options: XLA options by name, such as `{"xla_cpu_use_thunk_runtime": True}`; XLA
        refuses a name that it does not know.
      on_nonfinite: what is done with an update whose loss or gradients are not finite: `"apply"`
        it; `"skip"` it, which leaves all but `state.step` as it was, and set the metric `skipped`
        to 1; or `"stop"`, which makes neither this nor any later update: `state.halted` is true
        then, and the rest of the state is what the step failed on.
      deterministic: leave the compiler no operation whose result varies from run to run. That
        costs speed on GPUs (`xla_gpu_deterministic_ops`); the compilers for CPUs and TPUs have
        no such operation. The promise: the same program on as many devices of the same kind with
        the same versions gives the same bits.
      debug: an error where the loss or `init` uses a random key twice, found by JAX's own checker
        (`jax_debug_key_reuse`), for the price of tracing both once more.
      on_retrace: what is done with a batch that has the declared leaves in other lengths or
        dtypes: `"warn"` says which leaf changed and how (`sk.RetraceWarning`), and compiles a
        program for it, once for each form; `"error"` refuses it. Of several processes each knows
        its own batch alone, so there it is always an error.

    Returns:
      The step, compiled, its layouts and aliases read back from the executable.

    Raises:
      ShardingError: every leaf of state and batch that cannot be laid out, before anything is
        traced; or every constraint of the model that cannot be met, before it is compiled.
      StepError: an option, the loss or the optimizer does not form a step; with `debug`, a
        random key is used twice.

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
    return CompiledStep(
        declare(
            loss_fn,
            optimizer,
            init,
            batch,
            mesh,
            strategy or Strategy(),
            mode,
            compiler_options,
            on_nonfinite,
            deterministic,
            debug,
            on_retrace,
            accumulate=accumulate,
            remat=remat,
            precision=precision,
        )
    )
