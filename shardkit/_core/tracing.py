"""What a trace depends on, and what a traced program says about itself.

JAX keeps the traces of jitted functions and of loop bodies by the identity of the function, and
uses them again without running their Python. So nothing that shardkit reads or learns while a
model is traced may be a side effect of that Python:

- What a trace depends on is a `TraceContext`. Its value is part of the keys of JAX's trace,
  lowering and compile caches, so no trace is used where another value holds.
- What has to be known afterwards is a parameter of an equation: `record_fact` puts it into the
  program, and `recorded_facts` and `equations` read it from the jaxpr.
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


@dataclasses.dataclass(frozen=True)
class _Values:
    """The values of all contexts that have one, hashed once: JAX asks at each look-up."""

    items: tuple[tuple[str, Hashable], ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.items)

    def __hash__(self) -> int:
        return self._hash


# One for all contexts: each that is made adds to the keys of what JAX has traced so far.
_user_context = jax.make_user_context(None)


class TraceContext(Generic[_T]):
    """A value that traces may depend on, of this thread, None where nobody has set one.

    >>> policy = TraceContext[str]("policy")
    >>> with policy.use("full"):
    ...     print(policy.value)
    full
    >>> policy.value is None
    True
    """

    def __init__(self, name: str) -> None:
        """Takes a name that no other context has."""
        self._name = name

    @property
    def value(self) -> _T | None:
        """The value that holds here."""
        held = _user_context.value
        return cast(_T | None, dict(held.items).get(self._name)) if held else None

    @contextlib.contextmanager
    def use(self, value: _T | None) -> Iterator[None]:
        """Sets the value within the block.

        Args:
          value: compared by `==` and hashed; JAX's caches hold it as long as the trace, so it
            must hold no arrays.
        """
        held = _user_context.value
        values = {**dict(held.items if held else ()), self._name: value}
        items = tuple(sorted((k, v) for k, v in values.items() if v is not None))
        with _user_context(_Values(items) if items else None):
            yield


record_p = core.Primitive("shardkit_record")


def record_fact(result: Any, *fact: Hashable) -> Any:
    """Records a fact in the program that computes a result.

    Args:
      result: a pytree; its arrays carry the fact, through an operation that changes nothing.
      *fact: what is to be known of the program; the first says what kind of fact it is.

    Returns:
      The result, with the same values.
    """
    return jax.tree.map(
        lambda x: record_p.bind(x, fact=fact) if isinstance(x, jax.Array) else x, result
    )


def recorded_facts(jaxpr: core.Jaxpr, kind: str) -> tuple[Fact, ...]:
    """Facts of one kind in a program, without the kind, each once, in order.

    >>> def triple(x):
    ...     return record_fact(3 * x, "factor", 3)
    >>> recorded_facts(jax.make_jaxpr(jax.jit(triple))(1.0).jaxpr, "factor")
    ((3,),)
    """
    found = (eqn.params["fact"] for eqn in equations(jaxpr) if eqn.primitive is record_p)
    return tuple(dict.fromkeys(fact[1:] for fact in found if fact[0] == kind))


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Every equation of a jaxpr, each followed by those of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def _batch(args: Any, dims: Any, *, fact: Fact) -> Any:
    return record_p.bind(args[0], fact=fact), dims[0]


record_p.def_impl(lambda x, *, fact: x)
record_p.def_abstract_eval(lambda x, *, fact: x)
ad.deflinear2(record_p, lambda ct, _, *, fact: [record_p.bind(ct, fact=fact)])
batching.primitive_batchers[record_p] = _batch
mlir.register_lowering(record_p, lambda ctx, x, *, fact: [x])
