"""`StepSpec`: one training step as a frozen value, with every check that needs no mesh."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .._core.errors import Problem, ShardkitError, StepError, did_you_mean, raise_all
from .._core.options import option_problems
from .._core.precision import Precision, parse_precision
from .._core.tree import leaves_by_path, short_type
from .._core.types import Accumulate, Batch, Key, Loss, PyTree, Trainable
from ..nn._remat import parse_policy
from ..parallel import Strategy
from ._batch_rows import row_dim_problems
from ._compiled import CompiledStep
from ._miscompiled import OnMiscompiled
from ._nonfinite import ON_NONFINITE, OnNonfinite
from ._trainable import is_trainable

Mode = Literal["auto", "shard_map"]
OnRetrace = Literal["warn", "error"]
Declared = TypeVar("Declared")
Full = TypeVar("Full")

EVERYTHING_REPLICATED = Strategy()
_HEADLINE = "The step is declared wrongly."
_CHOICES = {
    "mode": get_args(Mode),
    "on_nonfinite": ON_NONFINITE,
    "on_retrace": get_args(OnRetrace),
    "on_miscompiled": get_args(OnMiscompiled),
}


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
      trainable: the parameters that are trained: globs over paths (`"lora/**"`, or several), or a
        predicate of a path. The others are frozen: laid out by the same rules and in the dtype
        that `init` gives them, but without gradient, optimizer state, reduction, or part in
        `grad_norm`. None: those that an adapter or `sk.Loss` names, else all.
      row_dims: which dim of each leaf of the batch counts its rows, by globs over their paths, the
        first match: `{"tokens": 1, "class_weights": None, "**": 0}` for time-major tokens and a
        leaf without rows. The first entry of a spec as `strategy.batch` is then that of the rows,
        and the others are those of the other dims; leaves without rows are replicated. By default
        a rule as `strategy.batch` says it (the dim that is split over the axes of the rows; a
        replicated leaf has no rows), else it is dim 0 of every leaf.
      on_miscompiled: what to do with a program in which XLA's partitioner lost the order of
        devices, so that its numbers are wrong. `"error"` raises; `"report"` leaves it a finding.

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

    def __post_init__(self) -> None:
        """Folds the overrides into the strategy and the batch into shapes; checks all fields.

        Raises:
          StepError: with every problem that can be found without a mesh.
        """
        overrides = {name: vars(self).pop(name) for name in _STRATEGY_FIELDS}
        problems = [*_type_problems(self), *_choice_problems(self), *_batch_problems(self)]
        if isinstance(self.strategy, Strategy):
            changes = {name: value for name, value in overrides.items() if value is not None}
            self._set("strategy", dataclasses.replace(self.strategy, **changes))
            problems += _strategy_problems(self)
        raise_all(StepError, _HEADLINE, problems)
        self._set("batch", jax.tree.map(_to_abstract, self.batch))
        self._set("compiler_options", dict(self.compiler_options))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def stateful(self) -> bool:
        """Whether the loss carries mutable model state."""
        return isinstance(self.loss_fn, Loss) and self.loss_fn.stateful

    def compile(self, mesh: Mesh) -> CompiledStep:
        """Compiles the step for one mesh, and checks the executable against the declaration.

        Args:
          mesh: from `MeshSpec.build` or `jax.make_mesh`; Explicit axes are taken as Auto.

        Returns:
          The compiled step, its layouts and aliases read back from the executable.

        Raises:
          ShardingError: every leaf of state and batch that cannot be laid out, before tracing; or
            every constraint of the model that cannot be met, before compiling.
          StepError: the mesh, the loss or the optimizer does not form a step; with `debug`, a
            random key is used twice.
        """
        return CompiledStep(self, mesh)

    def replace(self, **changes: Any) -> "StepSpec":
        """Returns the spec with some fields changed, checked again.

        A new `strategy` brings its own `accumulate`, `remat` and `parse_precision`.

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
    """Raises an error if an argument is not a `StepSpec`.

    Args:
      given: the user's argument.
      kind: type of the error.
      headline: of the error.
      other: what else the caller accepts, for the fix.

    Raises:
      ShardkitError: of this kind.
    """
    if isinstance(given, StepSpec):
        return
    fix = "sk.StepSpec(loss_fn=..., optimizer=..., init=..., batch=..., strategy=...)"
    fix = "step.spec" if isinstance(given, CompiledStep) else fix
    problem = Problem(
        "spec", f"is of type {_type_name(given)}", f"{fix}, or {other}" if other else fix
    )
    raise_all(kind, headline, [problem])


def check_mesh_given(step: Any, mesh: Mesh | None) -> None:
    """Checks that a `StepSpec` comes with a mesh, and a compiled step or a function without one.

    Raises:
      StepError: the mesh is missing, or superfluous.
    """
    if isinstance(step, StepSpec) == (mesh is not None):
        return
    why = "is given beside a step that has its own, or a function that compiles one"
    why = "is not given, and a StepSpec has none" if mesh is None else why
    fix = "sk.Trainer(spec, data, folder, mesh=mesh), or sk.Trainer(step, data, folder)"
    raise_all(StepError, "The step needs exactly one mesh.", [Problem("mesh", why, fix)])


def _to_abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _type_problems(spec: StepSpec) -> Iterator[Problem]:
    """Fields of the wrong type."""
    is_chain = isinstance(spec.optimizer, optax.GradientTransformation)
    rows = (
        ("loss_fn", callable(spec.loss_fn), "def loss_fn(params, batch, key): ..."),
        ("optimizer", is_chain, _optimizer_fix(spec.optimizer)),
        ("init", callable(spec.init), "def init(key): return params"),
        ("strategy", isinstance(spec.strategy, Strategy), "sk.Strategy(params=...)"),
        ("compiler_options", isinstance(spec.compiler_options, Mapping), '{"xla_option": True}'),
        ("trainable", is_trainable(spec.trainable), '"lora/**", or lambda path: "lora" in path'),
    )
    for name, is_right, fix in rows:
        if not is_right:
            yield Problem(name, f"is of type {_type_name(getattr(spec, name))}", fix)
    if isinstance(spec.compiler_options, Mapping):
        options = (dict(spec.compiler_options), Mapping[str, Any])
        yield from option_problems(compiler_options=options)
    yield from option_problems(
        deterministic=(spec.deterministic, bool),
        debug=(spec.debug, bool),
        independent_rows=(spec.independent_rows, bool),
    )


def _optimizer_fix(optimizer: Any) -> str:
    if isinstance(optimizer, optax.MultiSteps):
        return "optax.MultiSteps(...).gradient_transformation()"
    return "optax.adamw(1e-3), called"


def _choice_problems(spec: StepSpec) -> Iterator[Problem]:
    for field, known in _CHOICES.items():
        if (named := getattr(spec, field)) not in known:
            why = f"known: {', '.join(known)}.{did_you_mean(str(named), known)}"
            yield Problem(f"{field}={named!r}", why, f'{field}="{known[0]}"')


def _batch_problems(spec: StepSpec) -> Iterator[Problem]:
    wrong = [
        problem
        for path, x in leaves_by_path(spec.batch, "batch").items()
        if (problem := _leaf_problem(path, x))
    ]
    yield from wrong or row_dim_problems(spec.batch, spec.row_dims)


def _leaf_problem(path: str, x: Any) -> Problem | None:
    if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return Problem(path, f"is of type {_type_name(x)}, not an array", "numpy.asarray(...)")
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        fix = "jax.random.key_data(keys), and jax.random.wrap_key_data in the loss"
        why = f"is {short_type(x.shape, x.dtype)}, typed keys, not numbers"
        return Problem(path, why, fix)
    return None


def _strategy_problems(spec: StepSpec) -> list[Problem]:
    """Invalid options of the strategy, and combinations that do not work."""
    problems = [
        problem
        for name, read in _STRATEGY_FIELDS.items()
        for problem in _reader_problems(name, read, getattr(spec.strategy, name))
    ]
    compression = spec.strategy.compression
    if compression is not None and spec.mode != "shard_map":
        why = f"sums gradients over {compression.axis!r} itself; here the partitioner sums them"
        problems.append(Problem("compression", why, 'mode="shard_map"'))
    if problems or not spec.stateful or spec.accumulate.reduce != "end":
        return problems
    if spec.accumulate.micro_batches > 1 or spec.precision.reduces_separately:
        why = "would give every gradient shard its own statistics, different on every mesh"
        fix = 'accumulate=sk.Accumulate(k, reduce="every"), precision.reduce_dtype=None'
        problems.append(Problem("accumulate, precision.reduce_dtype", why, fix))
    return problems


def _reader_problems(name: str, read: Callable[[Any], Any], value: Any) -> Iterator[Problem]:
    """The problems in the error that an option's reader raises."""
    if name != "accumulate" and not isinstance(value, str | Precision):
        yield Problem(f"{name}={value!r}", f"is of type {_type_name(value)}", f'{name}="..."')
        return
    try:
        read(value)
    except StepError as error:
        text, _, fix = str(error).partition("\nFix: ")
        _, *rows = text.splitlines()
        for row in rows:
            subject, _, why = row.strip().partition("  ")
            yield Problem(subject, why.strip(), fix)


def _type_name(value: Any) -> str:
    return type(value).__name__
