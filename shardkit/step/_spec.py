"""`StepSpec`: one training step as a frozen value, checked as far as no mesh is needed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .._core.errors import Problem, ShardkitError, StepError, did_you_mean, raise_all
from .._core.options import option_problems
from .._core.precision import Precision, parse_precision
from .._core.tree import leaves_by_path
from .._core.types import Accumulate, Batch, Key, Loss, PyTree
from ..nn._remat import parse_policy
from ..parallel import Strategy
from ._compiled import CompiledStep
from ._nonfinite import ON_NONFINITE, OnNonfinite

Mode = Literal["auto", "shard_map"]
OnRetrace = Literal["warn", "error"]
Given = TypeVar("Given")
Read = TypeVar("Read")

EVERYTHING_REPLICATED = Strategy()
_HEADLINE = "The step is declared wrongly."
_NAMES = {"mode": get_args(Mode), "on_nonfinite": ON_NONFINITE, "on_retrace": get_args(OnRetrace)}


class Override(Generic[Given, Read]):
    """A field of a spec that, where it is given, replaces the strategy's field of its name.

    It reads as what the spec's strategy says, in full form, so that there is one place to look.
    """

    def __init__(self, read: Callable[[Any], Read]) -> None:
        """Takes the function from any form of the option to its full form."""
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        """Learns the field's name."""
        self._name = name

    @overload
    def __get__(self, spec: None, owner: type) -> None: ...
    @overload
    def __get__(self, spec: object, owner: type) -> Read: ...
    def __get__(self, spec: Any, owner: type) -> Read | None:
        """The field's default, which `dataclasses` asks the class for; or the strategy's value."""
        return None if spec is None else self._read(getattr(spec.strategy, self._name))

    def __set__(self, spec: object, given: Given | None) -> None:
        """Keeps an override for `StepSpec.__post_init__`, which takes it out again."""
        vars(spec)[self._name] = given


def full_accumulate(declared: int | Accumulate) -> Accumulate:
    """The full form of `accumulate=`."""
    return declared if isinstance(declared, Accumulate) else Accumulate(declared)


def _policy_name(declared: str) -> str:
    return declared


_OVERRIDES = {"accumulate": full_accumulate, "remat": parse_policy, "precision": parse_precision}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One training step, before it is compiled for a mesh: a frozen value that checks itself.

    `spec.compile(mesh)` makes the step; `sk.verify`, `sk.plan`, `sk.sweep` and `sk.Trainer` take
    the spec as it is.

    Attributes:
      loss_fn: `(params, batch, key) -> loss`. A loss is a floating-point scalar (a mean over
        equal-sized examples) or `sk.Mean(total, weight)`, alone or as `(loss, metrics)` with a
        dict of scalars or `sk.Mean`s. Plain scalars, the loss among them, are averaged over
        micro-batches; use an `sk.Mean` for a sum or a count. A model with mutable state is an
        `sk.Loss`.
      optimizer: any optax chain.
      init: `key -> params`, any pytree of floating-point arrays, some of them perhaps
        `sk.WithAxes`;
        or `key -> sk.Variables(params, model_state)`.
      batch: any pytree of arrays, numpy scalars or `jax.ShapeDtypeStruct`, global shapes; dim 0 of
        every leaf counts rows. The spec keeps `jax.ShapeDtypeStruct`s.
      strategy: the layout; by default everything is replicated.
      mode: `"auto"`: the partitioner places the collectives. `"shard_map"`: the loss and its
        gradients run on shards with explicit ones, for data, fsdp and tensor parallelism; the loss
        sees one device's rows, whole arrays otherwise, or is an `sk.ShardMapLoss`.
      accumulate: overrides `strategy.accumulate`; reads as `sk.Accumulate`.
      remat: overrides `strategy.remat`.
      precision: overrides `strategy.precision`; reads as `sk.Precision`.
      compiler_options: XLA options by name, such as `{"xla_cpu_use_thunk_runtime": True}`, for
        every program of the step; XLA refuses a name that it does not know.
      on_nonfinite: what is done with an update whose loss or gradients are not finite: `"apply"`
        it; `"skip"` it, which leaves all but `state.step` as it was, and set the metric `skipped`
        to 1; or `"stop"`, which makes neither this nor any later update: `sk.released(state)`
        is then the state that the step failed on.
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

    >>> import jax.numpy as jnp, optax
    >>> spec = StepSpec(
    ...     loss_fn=lambda params, batch, key: jnp.mean((batch @ params) ** 2),
    ...     optimizer=optax.sgd(0.1), init=lambda key: jnp.zeros((4, 2)), batch=jnp.ones((8, 4)),
    ...     accumulate=2)
    >>> spec.batch, spec.accumulate
    (ShapeDtypeStruct(shape=(8, 4), dtype=float32), Accumulate(steps=2, reduce='once'))
    >>> spec.replace(accumulate=4).accumulate.micro_batches
    4
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    init: Callable[[Key], PyTree]
    batch: Batch
    strategy: Strategy = EVERYTHING_REPLICATED
    mode: Mode = "auto"
    accumulate: Override[int | Accumulate, Accumulate] = Override(full_accumulate)
    remat: Override[str, str] = Override(_policy_name)
    precision: Override[str | Precision, Precision] = Override(parse_precision)
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_nonfinite: OnNonfinite = "apply"
    deterministic: bool = False
    debug: bool = False
    on_retrace: OnRetrace = "warn"

    def __post_init__(self) -> None:
        """Folds the overrides into the strategy and the batch into shapes; checks all fields.

        Raises:
          StepError: with everything that is wrong and needs no mesh to be found.
        """
        overrides = {name: vars(self).pop(name) for name in _OVERRIDES}
        problems = [*_type_problems(self), *_name_problems(self), *_batch_problems(self.batch)]
        if isinstance(self.strategy, Strategy):
            changes = {name: value for name, value in overrides.items() if value is not None}
            self._set("strategy", dataclasses.replace(self.strategy, **changes))
            problems += _strategy_problems(self)
        raise_all(StepError, _HEADLINE, problems)
        self._set("batch", jax.tree.map(_abstract, self.batch))
        self._set("compiler_options", dict(self.compiler_options))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def stateful(self) -> bool:
        """Whether the loss carries mutable model state."""
        return isinstance(self.loss_fn, Loss) and self.loss_fn.stateful

    def compile(self, mesh: Mesh) -> CompiledStep:
        """Compiles the step for one mesh, and checks that it is what was declared.

        Args:
          mesh: from `MeshSpec.build`, all axes of type Auto.

        Returns:
          The step, compiled, its layouts and aliases read back from the executable.

        Raises:
          ShardingError: every leaf of state and batch that cannot be laid out, before anything is
            traced; or every constraint of the model that cannot be met, before it is compiled.
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
        known = [*(field.name for field in dataclasses.fields(self)), *_OVERRIDES]
        problems = [
            Problem(name, f"is not a field of StepSpec.{did_you_mean(name, [*known, 'mesh'])}")
            for name in changes
            if name not in known
        ]
        fix = f"one of {', '.join(known)}; a mesh is given to step.replace or spec.compile"
        raise_all(StepError, "The spec cannot be changed.", problems, fix)
        return dataclasses.replace(self, **changes)


# An override is no state of a spec: it is in the strategy. As a field, `dataclasses.replace` would
# pass what the old strategy says on to a new one.
for _name in _OVERRIDES:
    del StepSpec.__dataclass_fields__[_name]


def check_step_spec(given: Any, kind: type[ShardkitError], headline: str, other: str = "") -> None:
    """Refuses what is no spec, where one is taken.

    Args:
      given: by a user.
      kind: of the error.
      headline: of the error.
      other: what else would be taken, for the fix.

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
    """Refuses a spec without a mesh, and a mesh beside what has one or compiles itself.

    Raises:
      StepError: one of these.
    """
    if isinstance(step, StepSpec) == (mesh is not None):
        return
    why = "is given beside a step that has its own, or a function that compiles one"
    why = "is not given, and a StepSpec has none" if mesh is None else why
    fix = "sk.Trainer(spec, data, folder, mesh=mesh), or sk.Trainer(step, data, folder)"
    raise_all(StepError, "There is not one mesh to compile for.", [Problem("mesh", why, fix)])


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _type_problems(spec: StepSpec) -> Iterator[Problem]:
    """Fields of the wrong type: what a first call is most likely to get wrong."""
    is_chain = isinstance(spec.optimizer, optax.GradientTransformation)
    rows = (
        ("loss_fn", callable(spec.loss_fn), "def loss_fn(params, batch, key): ..."),
        ("optimizer", is_chain, _optimizer_fix(spec.optimizer)),
        ("init", callable(spec.init), "def init(key): return params"),
        ("strategy", isinstance(spec.strategy, Strategy), "sk.Strategy(params=...)"),
        ("compiler_options", isinstance(spec.compiler_options, Mapping), '{"xla_option": True}'),
    )
    for name, is_right, fix in rows:
        if not is_right:
            yield Problem(name, f"is of type {_type_name(getattr(spec, name))}", fix)
    flags = {"deterministic": (spec.deterministic, bool), "debug": (spec.debug, bool)}
    yield from option_problems(**flags)


def _optimizer_fix(optimizer: Any) -> str:
    if isinstance(optimizer, optax.MultiSteps):
        return "optax.MultiSteps(...).gradient_transformation()"
    return "optax.adamw(1e-3), called"


def _name_problems(spec: StepSpec) -> Iterator[Problem]:
    for field, known in _NAMES.items():
        if (named := getattr(spec, field)) not in known:
            why = f"known: {', '.join(known)}.{did_you_mean(str(named), known)}"
            yield Problem(f"{field}={named!r}", why, f'{field}="{known[0]}"')


def _batch_problems(batch: Batch) -> Iterator[Problem]:
    for path, x in leaves_by_path(batch, "batch").items():
        if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            yield Problem(path, f"is of type {_type_name(x)}, not an array", "numpy.asarray(...)")


def _strategy_problems(spec: StepSpec) -> list[Problem]:
    """Options of the strategy that cannot be read, or that do not go with others."""
    problems = [
        problem
        for name, read in _OVERRIDES.items()
        for problem in _unreadable(name, read, getattr(spec.strategy, name))
    ]
    how = spec.strategy.compression
    if how is not None and spec.mode != "shard_map":
        why = f"sums gradients over {how.axis!r} itself, which the partitioner does here"
        problems.append(Problem("compression", why, 'mode="shard_map"'))
    if problems or not spec.stateful or spec.accumulate.reduce != "end":
        return problems
    if spec.accumulate.micro_batches > 1 or spec.precision.reduces_separately:
        why = "would give every lane of the batch its own statistics, other ones on every mesh"
        fix = 'accumulate=sk.Accumulate(k, reduce="every"), precision.reduce_dtype=None'
        problems.append(Problem("accumulate, precision.reduce_dtype", why, fix))
    return problems


def _unreadable(name: str, read: Callable[[Any], Any], value: Any) -> Iterator[Problem]:
    """The rows of the error that an option's own reader raises."""
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
