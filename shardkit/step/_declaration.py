"""What `compile_step` is given, checked as far as it can be without tracing."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from .._errors import Problem, StepError, did_you_mean, raise_all
from .._options import option_problems
from .._precision import Precision, precision
from .._remat import policy
from .._tree import leaves, leaves_by_path
from .._types import Accumulate, Loss
from ..mesh import MeshSpec
from ..parallel import Strategy
from ._nonfinite import ON_NONFINITE, OnNonfinite

MODES = ("auto", "shard_map")
OnRetrace = Literal["warn", "error"]
_HEADLINE = "The step is declared wrongly."


def accumulation(declared: int | Accumulate) -> Accumulate:
    """Returns the full form of `accumulate=`."""
    return declared if isinstance(declared, Accumulate) else Accumulate(declared)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """Everything that determines a compiled step.

    Attributes:
      loss_fn: `(params, batch, key) -> loss`, or an `sk.Loss`.
      optimizer: any optax chain.
      init: `key -> params`, or `key -> sk.Variables`.
      batch: pytree of `jax.ShapeDtypeStruct`, global shapes.
      mesh: the device mesh, all axes of type Auto; a `MeshSpec` where another process builds it.
      strategy: the layout.
      mode: `"auto"`: jit, the partitioner places the collectives; `"shard_map"`: they are explicit.
      compiler_options: XLA options by name, for every program of the step.
      on_nonfinite: what is done with an update whose loss or gradients are not finite.
      deterministic: whether the compiler may use no operation whose result varies.
      debug: whether tracing looks for random keys that are used twice.
      on_retrace: what is done with a batch of another form than `batch`.
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    init: Callable[[Any], Any]
    batch: Any
    mesh: Mesh | MeshSpec
    strategy: Strategy
    mode: str = "auto"
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_nonfinite: OnNonfinite = "apply"
    deterministic: bool = False
    debug: bool = False
    on_retrace: OnRetrace = "warn"

    @property
    def built_mesh(self) -> Mesh:
        """The mesh of a step that is compiled in this process."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh

    @property
    def precision(self) -> Precision:
        """The dtype policy."""
        return precision(self.strategy.precision)

    @property
    def accumulate(self) -> Accumulate:
        """Micro-batches per step."""
        return accumulation(self.strategy.accumulate)

    @property
    def xla_options(self) -> dict[str, Any]:
        """What the compiler is told; a declared option wins over what `deterministic` implies."""
        platform = self.built_mesh.devices.flat[0].platform
        # Implies xla_gpu_exclude_nondeterministic_ops and no autotuning, which would time kernels.
        implied = {"xla_gpu_deterministic_ops": True} if platform in ("gpu", "cuda") else {}
        return {**(implied if self.deterministic else {}), **self.compiler_options}

    @property
    def stateful(self) -> bool:
        """Whether the loss carries mutable model state."""
        return isinstance(self.loss_fn, Loss) and self.loss_fn.stateful

    def check(self) -> None:
        """Raises every problem that no tracing is needed for.

        Raises:
          StepError: an unknown mode, an Explicit mesh axis, per-lane statistics, an unknown
            precision or remat policy.
        """
        problems = _option_problems(self.strategy)
        flags = {name: (getattr(self, name), bool) for name in ("deterministic", "debug")}
        problems += option_problems(**flags)
        known_of = {
            "mode": MODES,
            "on_nonfinite": ON_NONFINITE,
            "on_retrace": get_args(OnRetrace),
        }
        for field, known in known_of.items():
            if (named := getattr(self, field)) not in known:
                why = f"known: {', '.join(known)}.{did_you_mean(str(named), known)}"
                problems.append(Problem(f"{field}={named!r}", why, f'{field}="{known[0]}"'))
        mesh = self.built_mesh
        problems += self._compression_problems(mesh)
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
            if kind != AxisType.Auto:
                why = f"is of type {kind.name}; the partitioner needs Auto axes"
                fix = "MeshSpec(...).build(), or Mesh(..., axis_types=(AxisType.Auto, ...))"
                problems.append(Problem(f"mesh axis {name!r}", why, fix))
        raise_all(StepError, _HEADLINE, problems)
        raise_all(StepError, _HEADLINE, self._misfits())
        once = self.accumulate.reduce == "once"
        if self.stateful and once and (self.accumulate.steps > 1 or self.precision.reduces_apart):
            why = "would give every lane of the batch its own statistics, other ones on every mesh"
            fix = 'accumulate=sk.Accumulate(k, reduce="each"), precision.reduce=None'
            raise_all(StepError, _HEADLINE, [Problem("accumulate, precision.reduce", why, fix)])

    def _compression_problems(self, mesh: Mesh) -> list[Problem]:
        how = self.strategy.compression
        if how is None:
            return []
        problems = []
        if self.mode != "shard_map":
            why = f"sums gradients over {how.axis!r} itself, which the partitioner does here"
            problems.append(Problem("compression", why, 'mode="shard_map"'))
        if how.axis not in mesh.shape:
            why = f"mesh axis {how.axis!r} is not in the mesh."
            why += did_you_mean(how.axis, mesh.shape)
            fix = f"sk.Compression({mesh.axis_names[0]!r})"
            problems.append(Problem("compression", why, fix))
        return problems

    def _misfits(self) -> list[Problem]:
        """What the carriers that this mesh needs cannot work with."""
        sizes = self.built_mesh.shape
        return [
            problem
            for _, carrier in self.strategy.regions
            if sizes.get(carrier.axis, 1) > 1
            for problem in carrier.misfits(self.accumulate, self.precision.reduces_apart)
        ]

    def replaced(self, **changes: Any) -> "Declaration":
        """Returns the declaration with some fields changed, checked again.

        Args:
          **changes: fields, and `accumulate`, `remat` or `precision` of the strategy.

        Raises:
          StepError: there is no such field, or the result does not form a step.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        known = [*fields, "accumulate", "remat", "precision"]
        problems = [
            Problem(name, f"is no part of a declaration.{did_you_mean(name, known)}")
            for name in changes
            if name not in known
        ]
        raise_all(StepError, _HEADLINE, problems, f"one of {', '.join(known)}")
        return declare(**{**fields, **changes})

    def check_params(self, params: Any) -> None:
        """Refuses parameters that no gradient can be taken of.

        Raises:
          StepError: naming each leaf that is not floating-point.
        """
        problems = [
            Problem(str(leaf), "is no floating-point array, so it has no gradient")
            for leaf in leaves(params)
            if not jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        fix = "return sk.Variables(params, extra) from init, with these leaves in extra"
        raise_all(StepError, "Some parameters cannot be trained.", problems, fix)


def declare(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    init: Callable[[Any], Any],
    batch: Any,
    mesh: Mesh,
    strategy: Strategy,
    mode: str = "auto",
    compiler_options: Mapping[str, Any] | None = None,
    on_nonfinite: OnNonfinite = "apply",
    deterministic: bool = False,
    debug: bool = False,
    on_retrace: OnRetrace = "warn",
    **options: Any,
) -> Declaration:
    """Puts the options that were given into the strategy and checks the whole."""
    _check_kinds(loss_fn, optimizer, init, batch, mesh, strategy)
    given = {name: value for name, value in options.items() if value is not None}
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), batch
    )
    layout = dataclasses.replace(strategy, **given)
    made = Declaration(
        loss_fn,
        optimizer,
        init,
        shapes,
        mesh,
        layout,
        mode,
        dict(compiler_options or {}),
        on_nonfinite,
        deterministic,
        debug,
        on_retrace,
    )
    made.check()
    return made


def _option_problems(strategy: Strategy) -> list[Problem]:
    """What is wrong with the options that have names, all of them together."""
    problems = []
    for read, declared in (
        (policy, strategy.remat),
        (precision, strategy.precision),
        (accumulation, strategy.accumulate),
    ):
        try:
            read(declared)
        except StepError as error:
            _, *rows = str(error).splitlines()
            problems += [Problem(row.strip(), "") for row in rows]
    return problems


def _check_kinds(
    loss_fn: Any, optimizer: Any, init: Any, batch: Any, mesh: Any, strategy: Any
) -> None:
    """Refuses arguments of the wrong kind: what a first call is most likely to get wrong."""
    wrong = [
        (not callable(loss_fn), "loss_fn", loss_fn, "def loss_fn(params, batch, key): ..."),
        (
            not isinstance(optimizer, optax.GradientTransformation),
            "optimizer",
            optimizer,
            _optimizer_fix(optimizer),
        ),
        (not callable(init), "init", init, "def init(key): return params"),
        (isinstance(mesh, MeshSpec), "mesh", mesh, f"sk.MeshSpec({mesh}).build()"),
        (
            not isinstance(mesh, Mesh | MeshSpec),
            "mesh",
            mesh,
            "sk.MeshSpec(data=2, tensor=4).build()",
        ),
        (not isinstance(strategy, Strategy), "strategy", strategy, "sk.Strategy(params=...)"),
    ]
    problems = [
        Problem(name, f"is {_kind(value)}", fix) for is_wrong, name, value, fix in wrong if is_wrong
    ]
    problems += [
        Problem(path, f"is {_kind(x)}, not an array", "numpy.asarray(...)")
        for path, x in leaves_by_path(batch, "batch").items()
        if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    ]
    raise_all(StepError, _HEADLINE, problems)


def _optimizer_fix(optimizer: Any) -> str:
    if isinstance(optimizer, optax.MultiSteps):
        return "optax.MultiSteps(...).gradient_transformation()"
    return "optax.adamw(1e-3), called"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"a {name}, not built yet" if isinstance(value, MeshSpec) else f"of type {name}"
