"""`StepSpec`: one training step as a frozen value, with every check that needs no mesh."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar, overload

import optax
from jax.sharding import Mesh

from .._core.batch_values import to_abstract, to_arrays
from .._core.errors import Problem, ShardkitError, StepError, did_you_mean, raise_all
from .._core.io._notebook import notebook_html
from .._core.precision import Precision, parse_precision
from .._core.trainable import parse_trainable
from .._core.tree import list_leaves
from .._core.types import Accumulate, Batch, Follows, Key, Loss, PyTree, Trainable
from ..nn._remat import parse_policy
from ..parallel import Strategy
from ._compiled import CompiledStep
from ._executable_checks import OnMiscompiled
from ._nonfinite import OnNonfinite
from ._program_cache import ProgramCache
from ._spec_problems import (
    Mode,
    OnRetrace,
    batch_problems,
    choice_problems,
    strategy_problems,
    type_name,
    type_problems,
)

Declared = TypeVar("Declared")
Full = TypeVar("Full")

EVERYTHING_REPLICATED = Strategy()
# Leaves of a batch that are named in the text of a spec.
_LEAVES = 6
_HEADLINE = "The step is declared wrongly."


class StrategyField(Generic[Declared, Full]):
    """A field of a spec that overrides the strategy's field of the same name.

    `StepSpec(accumulate=2, strategy=s)` stores `accumulate=2` in its strategy and nowhere else;
    `spec.accumulate` reads it back from there, in full form: `Accumulate(2)`.
    """

    def __init__(self, read: Callable[[Any], Full]) -> None:
        """Takes the function that converts any accepted form to the full form."""
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        """Stores the field's name."""
        self._name = name

    @overload
    def __get__(self, spec: None, owner: type) -> None: ...
    @overload
    def __get__(self, spec: object, owner: type) -> Full: ...
    def __get__(self, spec: Any, owner: type) -> Full | None:
        """Returns the strategy's value; on the class, where `dataclasses` looks, the default."""
        return None if spec is None else self._read(getattr(spec.strategy, self._name))

    def __set__(self, spec: object, given: Declared | None) -> None:
        """Stores the override until `StepSpec.__post_init__` moves it into the strategy."""
        vars(spec)[self._name] = given


def full_accumulate(declared: int | Accumulate) -> Accumulate:
    """Converts `accumulate=2` to `Accumulate(2)`."""
    return declared if isinstance(declared, Accumulate) else Accumulate(declared)


_STRATEGY_FIELDS = {
    "accumulate": full_accumulate,
    "remat": parse_policy,
    "precision": parse_precision,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One training step, declared and checked but not yet compiled for a mesh.

    `spec.compile(mesh)` compiles it; `sk.verify`, `sk.plan`, `sk.sweep` and `sk.Trainer` take the
    spec itself.

    Attributes:
      loss_fn: `(params, batch, key) -> loss`. A loss is a floating-point scalar (a mean over
        equal-sized examples) or `sk.Mean(total, weight)`, alone or as `(loss, metrics)` with a
        dict of scalars or `sk.Mean`s. Plain scalars, the loss among them, are averaged over
        micro-batches; use an `sk.Mean` for a sum or a count. A model with mutable state is an
        `sk.Loss`.
      optimizer: any optax chain.
      init: `key -> params`, a pytree of floating-point arrays or `sk.WithAxes`, or
        `key -> sk.Variables(params, model_state)`.
      batch: any pytree of arrays, numpy scalars or `jax.ShapeDtypeStruct`, global shapes; dim 0 of
        every leaf counts rows, unless `row_dims` or a rule as `strategy.batch` says otherwise. The
        spec keeps `jax.ShapeDtypeStruct`s.
      strategy: the layout; by default everything is replicated.
      mode: `"auto"`: the partitioner places the collectives. `"shard_map"`: the loss and its
        gradients run inside `shard_map` with explicit collectives, for data, fsdp and tensor
        parallelism; the loss sees the rows of one device, or is an `sk.ShardMapLoss`.
      accumulate: overrides `strategy.accumulate`; reads as `sk.Accumulate`.
      remat: overrides `strategy.remat`.
      precision: overrides `strategy.precision`; reads as `sk.Precision`.
      compiler_options: XLA options by name, such as `{"xla_cpu_use_thunk_runtime": True}`, for
        every program of the step; XLA rejects unknown names.
      on_nonfinite: what to do if the loss or a gradient is not finite. `"apply"` makes the update;
        `"skip"` leaves the state unchanged but for `state.step` and sets the metric `skipped` to
        1; `"stop"` makes neither this update nor a later one, and sets `state.halted`.
      deterministic: allow only operations whose results do not vary from run to run: the same
        program on the same number and kind of devices with the same versions gives the same bits.
        Costs speed on GPUs (`xla_gpu_deterministic_ops`); CPU and TPU compilers are always so.
      debug: raise an error if the loss or `init` uses a random key twice, found by JAX's checker
        (`jax_debug_key_reuse`). Traces both once more.
      on_retrace: what to do with a batch whose leaves have other lengths or dtypes than declared.
        `"warn"` names the leaf and the change (`sk.RetraceWarning`) and compiles a program for it,
        once per batch variant; `"error"` raises. With several processes it is always an error,
        since each process knows only its own batch.
      independent_rows: whether to take it that the loss is a mean of independent rows, or an
        `sk.Mean` of two sums over rows, without reading it from the program. Where the step splits
        rows, any other loss is an error; set this for one whose rows are independent in a way that
        cannot be seen.
      trainable: the parameters that are trained: globs over paths (`"lora/**"`, or several), a
        predicate of a path, or a tree of booleans as the parameters, of which one may stand for all
        below it (`{"body": False, "head": True}`). The others are frozen: laid out by the same
        rules and in the dtype that `init` gives them, but without gradient, optimizer state,
        reduction, or part in `grad_norm`. None: those that an adapter or `sk.Loss` names, else all.
      row_dims: which dim of each leaf of the batch counts its rows, by globs over their paths, the
        first match: `{"tokens": 1, "class_weights": None, "**": 0}` for time-major tokens and a
        leaf without rows. The first entry of a spec as `strategy.batch` is then that of the rows,
        and the others are those of the other dims; leaves without rows are replicated. By default
        a rule as `strategy.batch` says it (the dim that is split over the axes of the rows; a
        replicated leaf has no rows), else it is dim 0 of every leaf.
      on_miscompiled: what to do with a program in which XLA's partitioner lost the order of
        devices, so that its numbers are wrong. `"error"` raises; `"report"` leaves it a finding.
      owners: whether matrices that the optimizer multiplies (muon, soap, shampoo) are divided over
        the devices that their dims are split over, moved there and back once per update. None:
        where optax multiplies them (`optax.contrib.muon`). True: also in an optimizer of your own,
        whose Python must not ask how many matrices a leaf has, or how large it is. False leaves
        each product to the partitioner.

    >>> import jax.numpy as jnp, optax
    >>> spec = StepSpec(
    ...     loss_fn=lambda params, batch, key: jnp.mean((batch @ params) ** 2),
    ...     optimizer=optax.sgd(0.1), init=lambda key: jnp.zeros((4, 2)), batch=jnp.ones((8, 4)),
    ...     accumulate=2)
    >>> spec.batch, spec.accumulate
    (ShapeDtypeStruct(shape=(8, 4), dtype=float32), Accumulate(micro_batches=2, reduce='end'))
    >>> spec.replace(accumulate=4).accumulate.micro_batches
    4
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    init: Callable[[Key], PyTree]
    batch: Batch
    strategy: Strategy = EVERYTHING_REPLICATED
    mode: Mode = "auto"
    accumulate: StrategyField[int | Accumulate, Accumulate] = StrategyField(full_accumulate)
    remat: StrategyField[str, str] = StrategyField(str)
    precision: StrategyField[str | Precision, Precision] = StrategyField(parse_precision)
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_nonfinite: OnNonfinite = "apply"
    deterministic: bool = False
    debug: bool = False
    on_retrace: OnRetrace = "warn"
    independent_rows: bool = False
    trainable: Trainable = None
    row_dims: Mapping[str, int | None] | None = None
    on_miscompiled: OnMiscompiled = "error"
    owners: bool | None = None

    def __post_init__(self) -> None:
        """Folds the overrides into the strategy and the batch into shapes; checks all fields.

        Raises StepError with every problem that can be found without a mesh.
        """
        self._set("batch", to_arrays(self.batch))
        self._set("trainable", parse_trainable(self.trainable))
        overrides = {name: vars(self).pop(name) for name in _STRATEGY_FIELDS}
        problems = [*type_problems(self), *choice_problems(self), *batch_problems(self)]
        if isinstance(self.strategy, Strategy):
            changes = {name: value for name, value in overrides.items() if value is not None}
            self._set("strategy", dataclasses.replace(self.strategy, **changes))
            problems += strategy_problems(self, _STRATEGY_FIELDS)
        raise_all(StepError, _HEADLINE, problems)
        self._set("batch", to_abstract(self.batch))
        self._set("compiler_options", dict(self.compiler_options))

    def describe(self) -> dict[str, str]:
        """The loss, the batch and the layout in words."""
        shapes = list(map(str, list_leaves(self.batch)))
        more = [f"{len(shapes) - _LEAVES} more"] if len(shapes) > _LEAVES else []
        return {
            "loss": getattr(self.loss_fn, "__qualname__", type_name(self.loss_fn)),
            "batch": ", ".join(shapes[:_LEAVES] + more),
            "strategy": repr(self.strategy),
            "mode": self.mode,
        }

    def __repr__(self) -> str:
        return f"StepSpec({', '.join(f'{name}={text}' for name, text in self.describe().items())})"

    def _repr_html_(self) -> str:
        return notebook_html("StepSpec", self.describe())

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def stateful(self) -> bool:
        """Whether the loss carries mutable model state."""
        return isinstance(self.loss_fn, Loss) and self.loss_fn.stateful

    @property
    def follows(self) -> tuple[Follows, ...]:
        """Parameters that are laid out like others, as the loss says."""
        return self.loss_fn.follows if isinstance(self.loss_fn, Loss) else ()

    def compile(self, mesh: Mesh, *, cache: str | os.PathLike[str] | None = None) -> CompiledStep:
        """Compiles the step for one mesh, and checks the executable against the declaration.

        Args:
          mesh: from `MeshSpec.build` or `jax.make_mesh`; Explicit axes are taken as Auto.
          cache: a folder that keeps what is compiled. The same program is loaded from there the
            next time, if versions, flags and devices are the same; several processes may use one
            folder at the same time. A file that cannot be used, or a folder that cannot be written,
            is reported (`sk.SavedStepWarning`), and the step compiles. With several processes that
            run one step together, or several simulated CPU devices, it keeps nothing.

        Returns:
          The compiled step, its layouts and aliases read back from the executable.

        Raises:
          ShardingError: every leaf of state and batch that cannot be laid out, before tracing; or
            every constraint of the model that cannot be met, before compiling.
          StepError: the mesh, the loss or the optimizer does not form a step; with `debug`, a
            random key is used twice.
        """
        return CompiledStep(self, mesh, ProgramCache.at(cache, mesh))

    def replace(self, **changes: Any) -> "StepSpec":
        """Returns the spec with some fields changed, checked again.

        A new `strategy` brings its own `accumulate`, `remat` and `precision`.

        Args:
          **changes: fields of the spec.

        Raises:
          StepError: there is no such field, or the result does not form a step.
        """
        known = [*(field.name for field in dataclasses.fields(self)), *_STRATEGY_FIELDS]
        problems = [
            Problem(name, f"is not a field of StepSpec.{did_you_mean(name, [*known, 'mesh'])}")
            for name in changes
            if name not in known
        ]
        fix = f"one of {', '.join(known)}; a mesh is given to step.replace or spec.compile"
        raise_all(StepError, "The spec cannot be changed.", problems, fix)
        return dataclasses.replace(self, **changes)


# The strategy holds these values. As fields, `dataclasses.replace(spec, strategy=new)` would copy
# `accumulate` of the old strategy into the new one.
for _name in _STRATEGY_FIELDS:
    del StepSpec.__dataclass_fields__[_name]


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
    independent_rows: bool = False,
    trainable: Trainable = None,
    row_dims: Mapping[str, int | None] | None = None,
    on_miscompiled: OnMiscompiled = "error",
    owners: bool | None = None,
) -> CompiledStep:
    """Compiles one training step; the same as `StepSpec(...).compile(mesh)`.

    `mesh` comes from `MeshSpec.build` or `jax.make_mesh`. Every other argument is a field of
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


def check_step_spec(given: Any, kind: type[ShardkitError], headline: str, other: str = "") -> None:
    """Raises an error of a kind if an argument is not a `StepSpec`.

    Its fix names what else the caller accepts.
    """
    if isinstance(given, StepSpec):
        return
    fix = "sk.StepSpec(loss_fn=..., optimizer=..., init=..., batch=..., strategy=...)"
    fix = "step.spec" if isinstance(given, CompiledStep) else fix
    fix = f"{fix}, or {other}" if other else fix
    raise kind.of(headline, "spec", f"is of type {type_name(given)}", fix)


def check_mesh_given(step: Any, mesh: Mesh | None) -> None:
    """Raises StepError for a `StepSpec` without a mesh, or a compiled step or function with one."""
    if isinstance(step, StepSpec) == (mesh is not None):
        return
    why = "is given beside a step that has its own, or a function that compiles one"
    why = "is not given, and a StepSpec has none" if mesh is None else why
    fix = "sk.Trainer(spec, data, folder, mesh=mesh), or sk.Trainer(step, data, folder)"
    raise StepError.of("The step needs exactly one mesh.", "mesh", why, fix)
