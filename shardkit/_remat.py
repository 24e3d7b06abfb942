"""Named checkpoint policies: what a layer's backward pass keeps, and what it computes again.

A model marks its layers with `remat(layer)`; the strategy names the policy. The mark does
nothing where no policy is active, so a model can be used outside a compiled step as it stands.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

from ._errors import Problem, StepError, did_you_mean, format_problems, raise_all
from ._options import option_problems

_policies = jax.checkpoint_policies
_P = ParamSpec("_P")
_R = TypeVar("_R")

# Name of what a strategy, not a policy, decided to keep; nothing has it unless one did.
KEPT = "kept_weight"
_kept = _policies.save_only_these_names(KEPT)

_NAMED: dict[str, Callable[..., Any]] = {
    "full": _kept,
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _kept),
    "dots_no_batch": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _kept
    ),
}
_SAVE = "save:"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A `jax.checkpoint` policy that remembers the name it was declared by."""

    name: str
    saveable: Callable[..., Any]
    names: tuple[str, ...] = ()

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        """Says whether the result of one primitive is kept for the backward pass."""
        return self.saveable(primitive, *avals, **params)


@dataclasses.dataclass
class Marks:
    """The policy of the step being traced, and how many layers asked for it."""

    policy: Policy | None
    count: int = 0


_active: contextvars.ContextVar[Marks | None] = contextvars.ContextVar("remat", default=None)
# The policies under which marked layers were traced since JAX's caches were last dropped.
_traced: set[Policy | None] = set()


@functools.lru_cache(maxsize=64)
def policy(name: str) -> Policy | None:
    """Returns the checkpoint policy of a name.

    Args:
      name: `"none"` keeps every intermediate; `"full"` keeps the layer's inputs alone; `"dots"`
        keeps the results of matrix products; `"dots_no_batch"` only those without batch dims;
        `"save:attn_out,mlp_out"` keeps what the model named with
        `jax.ad_checkpoint.checkpoint_name`.

    Returns:
      The policy, or None for `"none"`.

    Raises:
      StepError: the name is none of these.

    >>> policy("none"), policy("full").name
    (None, 'full')
    """
    if name == "none":
        return None
    if name in _NAMED:
        return Policy(name, _NAMED[name])
    names = [n.strip() for n in name.removeprefix(_SAVE).split(",")]
    if name.startswith(_SAVE) and all(names):
        return Policy(name, _policies.save_only_these_names(KEPT, *names), tuple(names))
    known = ["none", *_NAMED]
    why = f"unknown policy; known: {', '.join(known)}, save:<name>,<name>."
    problem = Problem(f"remat={name!r}", why + did_you_mean(name, known))
    raise StepError(format_problems("No such remat policy.", [problem], 'remat="full"'))


@functools.lru_cache(maxsize=64)
def regathering(base: Policy | None, axes: tuple[str, ...]) -> Policy:
    """The same policy, except that what was gathered over mesh axes is gathered again.

    Without it the backward pass would keep every layer's gathered weights.
    """

    def saveable(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name == "all_gather" and set(params["axis_name"]) <= set(axes):
            return False
        return base is None or base(primitive, *avals, **params)

    names = base.names if base else ()
    return Policy(f"{base.name if base else 'none'}, regathering", saveable, names)


def remat(layer: Callable[_P, _R], *, scanned: bool = False) -> Callable[_P, _R]:
    """Marks a layer as the unit that the step's remat policy applies to.

    Args:
      layer: a function of arrays, or pytrees of them, alone.
      scanned: the layer is the body of a `jax.lax.scan`, whose loop already keeps XLA from
        merging the recomputation with the forward pass; unrolled layers need a barrier for that.

    Returns:
      A function that computes the same, under `jax.checkpoint` where a policy is active.
    """
    problems = option_problems("remat.", scanned=(scanned, bool))
    raise_all(StepError, "A layer is marked wrongly.", problems)

    @functools.wraps(layer)
    def marked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        marks = _active.get()
        _traced.add(marks.policy if marks else None)
        if marks is None:
            return layer(*args, **kwargs)
        marks.count += 1
        if marks.policy is None:
            return layer(*args, **kwargs)
        kept = jax.checkpoint(layer, policy=marks.policy, prevent_cse=not scanned)
        return kept(*args, **kwargs)

    return marked


def in_turn(part: Callable[_P, _R], output: str) -> Callable[_P, _R]:
    """Marks a part of a layer that is computed again only when its own gradient has arrived.

    A layer's backward pass otherwise computes all that it needs again at once, and holds it: an
    attention's gathered input, while the gradients of the branch after it are made. Where the
    policy keeps the part's output nothing else asks for the part earlier, so it can wait.

    Args:
      part: a function of arrays, or pytrees of them, alone, inside a layer marked by `remat`.
      output: name under which the caller marks the part's result with `checkpoint_name`.

    Returns:
      A function that computes the same; it waits where the active policy keeps `output`.
    """

    @functools.wraps(part)
    def marked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        marks = _active.get()
        if marks is None or marks.policy is None or output not in marks.policy.names:
            return part(*args, **kwargs)
        return jax.checkpoint(part, policy=marks.policy)(*args, **kwargs)

    return marked


@contextlib.contextmanager
def active(named: Policy | None) -> Iterator[Marks]:
    """Makes a policy the one that marked layers follow while a step is traced.

    JAX keeps the traces of scan bodies and inner `jit`s by function identity, and a trace holds
    the policy that it was made under. So where marked layers were traced under another one, JAX's
    caches are dropped first; a program without marks never pays for that.
    """
    if _traced - {named}:
        jax.clear_caches()
        _traced.clear()
    marks = Marks(named)
    token = _active.set(marks)
    try:
        yield marks
    finally:
        _active.reset(token)
