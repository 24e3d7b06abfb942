"""The mesh and the activation rules that a model's own constraints find while a step is traced.

A model may constrain arrays itself, by `jax.lax.with_sharding_constraint` with a bare spec or by
flax's logical names, and it may call `jax.shard_map` without a mesh. These read the mesh and the
rules around them: here those of the step, whatever its caller has set, whose own are back after.
"""

import contextlib
import dataclasses
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from .._core.donation import raise_traced
from .._core.errors import Problem, ShardingError, did_you_mean, format_problems
from .._core.source import find_user_line
from .._core.tracing import TraceContext
from ..rules import AxisRules, format_mesh
from ._refused_constraints import explain_refused_constraints, taken_axis

# Guards the warning filters of the whole process; one thread at a time changes and restores them.
_WARNING_FILTERS = threading.Lock()

# What is traced without flax's rules is not reused with them; `use_resolver` tells rules apart.
_has_flax = TraceContext[bool]("flax")

# Where flax keeps the rules of its logical names, for linen and nnx alike.
_FLAX = "flax.core.spmd"

_NO_MESH = Mesh(np.empty((), object), ())


@contextlib.contextmanager
def around_init(mesh: Mesh) -> Iterator[None]:
    """Traces `init` with a mesh around, for constraints by a bare spec.

    `Strategy.params` lays the parameters out, so the names that flax gives them constrain nothing:
    linen and nnx look for `jax.set_mesh` before they apply them. Raises ShardingError for a
    constraint that JAX refuses.
    """
    with _legacy_mesh(mesh), _set_mesh(_NO_MESH), _flax_rules(()), _lazy_nnx():
        with explain_refused_constraints(mesh):
            yield


@contextlib.contextmanager
def around_loss(mesh: Mesh, rules: AxisRules | None) -> Iterator[None]:
    """Traces a loss with a mesh and activation rules around.

    The mesh is that of `jax.set_mesh` and of `with mesh:`, which do not see each other, and the
    rules are those of flax's logical names. Raises ShardingError if JAX refuses a constraint of the
    model or a `shard_map` of its own; if the rules do not list a name of flax's; or if the loss
    imports flax, which is too late to give it rules.
    """
    has_flax = _FLAX in sys.modules
    flax = _flax_rules(_FlaxRules(((rules, mesh),)))
    with _legacy_mesh(mesh), _set_mesh(mesh), _has_flax.use(has_flax), flax:
        with explain_refused_constraints(mesh):
            yield
    if _FLAX in sys.modules and not has_flax:
        problem = Problem("loss_fn", "imports flax while it is traced", "import flax before")
        headline = "Logical names of flax would constrain nothing."
        raise ShardingError(format_problems(headline, [problem]))


@contextlib.contextmanager
def no_ambient_mesh() -> Iterator[None]:
    """Hides a `with mesh:` or `jax.set_mesh` around the caller from what is traced."""
    with _legacy_mesh(_NO_MESH), _set_mesh(_NO_MESH):
        yield


def _set_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    try:
        return jax.set_mesh(mesh)
    except ValueError as error:  # which JAX raises under a trace, of whatever mesh
        if "outside" not in str(error):
            raise
        raise_traced("step", "is compiled while a function is traced")


@contextlib.contextmanager
def _legacy_mesh(mesh: Mesh) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # `with mesh:` is deprecated, but models still read it, and only it hides the caller's.
            warnings.simplefilter("ignore", DeprecationWarning)
            stack.enter_context(mesh)
        yield


def _flax_rules(rules: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
    """Sets flax's logical rules; a process that has not imported flax has no model of it."""
    flax = sys.modules.get(_FLAX)
    return flax.logical_axis_rules(rules) if flax else contextlib.nullcontext()


def _lazy_nnx() -> contextlib.AbstractContextManager[Any]:
    """Keeps nnx from laying out each variable that names its dims, as soon as it is made."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.use_eager_sharding(False) if nnx else contextlib.nullcontext()


class _FlaxRules(tuple[Any, ...]):
    """A strategy's rules in the form of flax: a tuple of `(name, mesh axes)`, in order.

    As for `sk.nn.constrain`, axes that are manual where the rules are read split nothing.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        rules, mesh = self[0]
        manual = jax.sharding.get_abstract_mesh().manual_axes
        table = [
            (name, tuple(axis for axis in axes if axis not in manual))
            for name, axes in (rules.table if rules else ())
        ]
        for name, axes in table:
            yield name, axes if len(axes) > 1 else axes[0] if axes else None
        for name, axes in table:
            if axes:
                yield _Again(name), taken_axis(", ".join(axes), name)
        yield _Unlisted(rules, mesh), None


class _Again(str):
    """A name in a second row, which flax reaches if the mesh axis of the first is taken already.

    A dict of the rows, as flax makes for nnx, keeps both.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash((str(self), "again"))


@dataclasses.dataclass(frozen=True, eq=False)
class _Unlisted:
    """The last row of flax's rules: refuses every name that no row before it lists.

    flax compares the name of each row with the names of a constraint, and would leave a dim whole
    that no row names. The names in the box of a parameter are those of `Strategy.params`, and may
    be unlisted: flax unboxes them, to learn a shape, wherever the parameter is used.
    """

    rules: AxisRules | None
    mesh: Mesh

    def __eq__(self, name: object) -> bool:
        if isinstance(name, str) and name not in dict(self.rules.table if self.rules else ()):
            frames = [frame for frame, _ in traceback.walk_stack(None)]
            if not any(frame.f_code.co_name == "unbox" for frame in frames):
                _refuse_name(name, self.rules, self.mesh)
        return False

    def __hash__(self) -> int:
        return id(self)


def _refuse_name(name: str, rules: AxisRules | None, mesh: Mesh) -> NoReturn:
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    place = find_user_line(frames)
    subject = f"logical axis {name!r}{f' at {place}' if place else ''}"
    if rules is None:
        why = "is constrained by the model, and the strategy has no table of activations"
        fix = f'Strategy(activations=sk.AxisRules({{"{name}": None}})), or a mesh axis'
    else:
        why = "is constrained by the model, and the strategy's activations do not list it."
        why += did_you_mean(name, [known for known, _ in rules.table])
        fix = f"strategy.with_names(activations={{{name!r}: None}}), or a mesh axis"
    headline = f"A logical constraint cannot be met on mesh {format_mesh(mesh.shape)}."
    raise ShardingError.of(headline, subject, why, fix)
