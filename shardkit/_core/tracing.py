"""Values that a trace depends on, and facts that a traced program records about itself.

JAX caches the traces of jitted functions and of loop bodies by function identity, and reuses them
without running their Python. So shardkit neither reads nor learns anything as a side effect of
that Python:

- A value that a trace depends on is a `TraceContext`. It is part of the keys of JAX's trace,
  lowering and compile caches, so a trace is never reused under another value.
- A fact that is needed after tracing is a parameter of an equation: `record_fact` puts it into
  the program, `recorded_facts` reads it from the jaxpr.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar, cast

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_T = TypeVar("_T", bound=Hashable)
Fact = tuple[Hashable, ...]
SETTINGS: Any = jax.config
"""JAX's settings in this process, of which its stubs do not list every one."""


@dataclasses.dataclass(frozen=True)
class _Values:
    """The values of all contexts, hashed once: JAX asks for the hash at every cache look-up."""

    items: tuple[tuple[str, Hashable], ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.items)

    def __hash__(self) -> int:
        return self._hash


# One for all contexts: each `make_user_context` lengthens the keys of JAX's caches.
_user_context = jax.make_user_context(None)


class TraceContext(Generic[_T]):
    """A value of this thread that traces depend on; None unless it is set.

    >>> policy = TraceContext[str]("policy")
    >>> with policy.use("full"):
    ...     print(policy.value)
    full
    >>> policy.value is None
    True
    """

    def __init__(self, name: str) -> None:
        """Makes a context; `name` is unique among all contexts."""
        self._name = name

    @property
    def value(self) -> _T | None:
        """The innermost value that is set."""
        values = _user_context.value
        return cast(_T | None, dict(values.items).get(self._name)) if values else None

    @contextlib.contextmanager
    def use(self, value: _T | None) -> Iterator[None]:
        """Sets the value, compared by `==` and hashed, within the block.

        JAX's caches hold it as long as the trace, so it must not hold arrays.
        """
        outer = _user_context.value
        values = {**dict(outer.items if outer else ()), self._name: value}
        items = tuple(sorted((k, v) for k, v in values.items() if v is not None))
        with _user_context(_Values(items) if items else None):
            yield


record_p = core.Primitive("shardkit_record")


def record_fact(result: Any, *fact: Hashable) -> Any:
    """Records a fact, its kind first, by an identity operation on each array of a pytree."""
    return jax.tree.map(
        lambda x: record_p.bind(x, fact=fact) if isinstance(x, jax.Array) else x, result
    )


def recorded_facts(jaxpr: core.Jaxpr, kind: str) -> tuple[Fact, ...]:
    """Returns the facts of one kind in a program, without the kind, each once, in order.

    >>> def triple(x):
    ...     return record_fact(3 * x, "factor", 3)
    >>> recorded_facts(jax.make_jaxpr(jax.jit(triple))(1.0).jaxpr, "factor")
    ((3,),)
    """
    facts = (eqn.params["fact"] for eqn in equations(jaxpr) if eqn.primitive is record_p)
    return tuple(dict.fromkeys(fact[1:] for fact in facts if fact[0] == kind))


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields every equation of a jaxpr, each followed by those of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def uses_dtype(jaxpr: core.Jaxpr, dtype: Any) -> bool:
    """Whether an operation of a jaxpr has a result of this dtype.

    >>> uses_dtype(jax.make_jaxpr(lambda x: x.astype("float16"))(1.0).jaxpr, "float16")
    True
    """
    avals: Iterator[Any] = (v.aval for eqn in equations(jaxpr) for v in eqn.outvars)
    return any(getattr(aval, "dtype", None) == dtype for aval in avals)


def _batch(args: Any, dims: Any, *, fact: Fact) -> Any:
    return record_p.bind(args[0], fact=fact), dims[0]


record_p.def_impl(lambda x, *, fact: x)
record_p.def_abstract_eval(lambda x, *, fact: x)
ad.deflinear2(record_p, lambda ct, _, *, fact: [record_p.bind(ct, fact=fact)])
batching.primitive_batchers[record_p] = _batch
mlir.register_lowering(record_p, lambda ctx, x, *, fact: [x])
