"""Named checkpoint policies: what a layer's forward pass saves, and what is recomputed.

A model marks its layers with `remat(layer)`; the strategy names the policy. Outside a compiled
step no policy is active and the mark does nothing.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from .._core.errors import StepError, did_you_mean, raise_all
from .._core.options import option_problems
from .._core.tracing import TraceContext, equations, record_fact, recorded_facts

_policies = jax.checkpoint_policies
_P = ParamSpec("_P")
_R = TypeVar("_R")

# Checkpoint name of gathered weights that a strategy keeps from forward to backward.
KEPT_PARAM = "kept_weight"
# Fact of what is computed again from less, whatever a policy saves: floats that codes stand for.
NEVER_SAVED = "never saved"
# Fact of a loss that is checkpointed as a whole, since it marks no layer.
WHOLE = "rematerialized as a whole"
_save_kept_params = _policies.save_only_these_names(KEPT_PARAM)

_NAMED: dict[str, Callable[..., Any]] = {
    "full": _save_kept_params,
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _save_kept_params),
    "dots_no_batch": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _save_kept_params
    ),
}
_SAVE = "save:"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A `jax.checkpoint` policy with the name it was declared by."""

    name: str  # the declared name; policies of one name are equal
    saveable: Callable[..., Any] = dataclasses.field(compare=False)  # the policy as JAX takes it
    names: tuple[str, ...] = ()  # checkpoint names of the intermediates that it saves
    # whether it applies to a part of a layer and not to a layer that `remat` marks
    within_layer: bool = False

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        """Whether the result of one primitive is saved for the backward pass."""
        return self.saveable(primitive, *avals, **params)


# The policy of the step being traced.
_active = TraceContext[Policy]("remat")


@functools.lru_cache(maxsize=64)
def parse_policy(name: str) -> Policy | None:
    """Returns the checkpoint policy of a name, None for `"none"`, which saves every intermediate.

    `"full"` saves only the layer's inputs; `"dots"` the results of matrix products;
    `"dots_no_batch"` only those without batch dims; `"save:attn_out,mlp_out"` what the model named
    with `jax.ad_checkpoint.checkpoint_name`. Raises StepError for other names.

    >>> parse_policy("none"), parse_policy("full").name
    (None, 'full')
    """
    if name == "none":
        return None
    if name in _NAMED:
        return Policy(name, _NAMED[name])
    names = [n.strip() for n in name.removeprefix(_SAVE).split(",")]
    if name.startswith(_SAVE) and all(names):
        return Policy(name, _policies.save_only_these_names(KEPT_PARAM, *names), tuple(names))
    known = ["none", *_NAMED]
    why = f"unknown policy; known: {', '.join(known)}, save:<name>,<name>."
    why += did_you_mean(name, known)
    raise StepError.of("No such remat policy.", f"remat={name!r}", why, 'remat="full"')


@functools.lru_cache(maxsize=64)
def regathering_policy(base: Policy | None, axes: tuple[str, ...]) -> Policy:
    """Returns a policy that also repeats all-gathers over some mesh axes in the backward pass.

    With `base` alone each layer's gathered weights would be saved for the backward pass, and those
    that codes stand for in floats.
    """

    def saveable(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name == "all_gather" and set(params["axis_name"]) <= set(axes):
            return False
        if (inner := params.get("call_jaxpr")) and recorded_facts(inner.jaxpr, NEVER_SAVED):
            return False
        return base is None or base(primitive, *avals, **params)

    names = base.names if base else ()
    name = f"{base.name if base else 'none'}, regathering over {', '.join(axes)}"
    return Policy(name, saveable, names)


def remat(layer: Callable[_P, _R], *, scanned: bool = False) -> Callable[_P, _R]:
    """Marks a layer as the unit that the step's remat policy applies to.

    Args:
      layer: a function whose arguments are pytrees of arrays.
      scanned: whether the layer is the body of a `jax.lax.scan`. The loop already keeps XLA from
        merging the recomputation with the forward pass; other layers need a barrier for that.

    Returns:
      The same function, under `jax.checkpoint` if a policy is active.
    """
    problems = option_problems("remat.", scanned=(scanned, bool))
    raise_all(StepError, "sk.nn.remat has a wrong option.", problems)

    @functools.wraps(layer)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        policy = _active.value
        if policy is None:
            return layer(*args, **kwargs)
        return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)(*args, **kwargs)

    return call


def defer_remat(part: Callable[_P, _R], output: str) -> Callable[_P, _R]:
    """Defers the recomputation of a part of a layer until the gradient of its output arrives.

    A layer's backward pass recomputes everything at once and holds it, such as the gathered input
    of attention while the gradients of the MLP after it are computed. If the active policy saves
    the `checkpoint_name` that the caller gives the part's `output`, nothing needs its intermediates
    earlier: the part is recomputed by itself. The layer is one marked by `remat`.
    """

    @functools.wraps(part)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        policy = _active.value
        if policy is None or output not in policy.names:
            return part(*args, **kwargs)
        within = dataclasses.replace(policy, within_layer=True)
        return jax.checkpoint(part, policy=within)(*args, **kwargs)

    return call


def use_policy(policy: Policy | None) -> contextlib.AbstractContextManager[None]:
    """Makes marked layers follow a policy while a step is traced in the block."""
    return _active.use(policy)


def apply_policy(
    function: Callable[_P, _R], policy: Policy | None, *args: _P.args, **kwargs: _P.kwargs
) -> Callable[_P, _R]:
    """Puts a whole function under a policy if none of its layers is marked with `remat`.

    Arguments are abstract. The program of the `jax.checkpoint` of it has the fact `WHOLE`; without
    a policy everything is saved.
    """
    if policy is None:
        return function
    with use_policy(policy):
        traced = jax.make_jaxpr(function)(*args, **kwargs)
    # The policy of a `jax.checkpoint` is a parameter of its equation.
    if any(eqn.params.get("policy") == policy for eqn in equations(traced.jaxpr)):
        return function

    def whole(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result = jax.checkpoint(function, policy=policy)(*args, **kwargs)
        return record_fact(result, WHOLE)

    return whole
