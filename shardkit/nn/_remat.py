"""Named checkpoint policies: what a layer's backward pass keeps, and what it computes again.

A model marks its layers with `remat(layer)`; the strategy names the policy. The mark does
nothing where no policy is active, so a model can be used outside a compiled step as it stands.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from .._core.errors import Problem, StepError, did_you_mean, format_problems, raise_all
from .._core.options import option_problems
from .._core.tracing import TraceContext, equations

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
    """A `jax.checkpoint` policy that remembers the name it was declared by.

    Attributes:
      name: the declared name; policies of one name are equal.
      saveable: the policy as JAX takes it.
      names: of the intermediates that it keeps by name.
      within_layer: it applies to a part of a layer, not to what `remat` marks.
    """

    name: str
    saveable: Callable[..., Any] = dataclasses.field(compare=False)
    names: tuple[str, ...] = ()
    within_layer: bool = False

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        """Says whether the result of one primitive is kept for the backward pass."""
        return self.saveable(primitive, *avals, **params)


# The policy of the step being traced.
_active = TraceContext[Policy]("remat")


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
    name = f"{base.name if base else 'none'}, regathering over {', '.join(axes)}"
    return Policy(name, saveable, names)


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
        named = _active.value
        if named is None:
            return layer(*args, **kwargs)
        return jax.checkpoint(layer, policy=named, prevent_cse=not scanned)(*args, **kwargs)

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
        named = _active.value
        if named is None or output not in named.names:
            return part(*args, **kwargs)
        within = dataclasses.replace(named, within_layer=True)
        return jax.checkpoint(part, policy=within)(*args, **kwargs)

    return marked


def active(named: Policy | None) -> contextlib.AbstractContextManager[None]:
    """Makes a policy the one that marked layers follow while a step is traced."""
    return _active.use(named)


def apply_policy(
    function: Callable[_P, _R], named: Policy | None, *args: _P.args, **kwargs: _P.kwargs
) -> Callable[_P, _R]:
    """Returns a function under a policy: as a whole, where it marks no layer with `remat`.

    Args:
      function: a function of arrays, such as a loss.
      named: the policy that its layers will be traced under; None keeps everything.
      *args: abstract arguments of the function.
      **kwargs: the same by keyword.
    """
    if named is None:
        return function
    with active(named):
        traced = jax.make_jaxpr(function)(*args, **kwargs)
    # The policy of a `jax.checkpoint` is a parameter of its equation.
    if any(eqn.params.get("policy") == named for eqn in equations(traced.jaxpr)):
        return function
    return jax.checkpoint(function, policy=named)
