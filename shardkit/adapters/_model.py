"""`Model`: the result of every adapter."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._core.errors import StepError
from .._core.types import Key, Loss, Params, Variables, WithAxes


@dataclasses.dataclass(frozen=True)
class Model:
    """A library's module as pure functions: the `init` and `loss_fn` of a `sk.StepSpec`.

    `sk.StepSpec(loss_fn=model.loss_fn, init=model.init, ...)` trains it.

    Attributes:
      init: `key -> params`, or `key -> sk.Variables` for a module with other state. Leaves whose
        dims the module names are `sk.WithAxes`.
      loss_fn: the loss in its training and evaluation forms.
      bind: `(params, model_state={}) -> module` in evaluation mode, with these arrays: an nnx
        module, or for linen a function of the module's inputs.
    """

    init: Callable[[Key], Params | Variables]
    loss_fn: Loss
    bind: Callable[..., Any]


def check_state_is_given(model_state: Any, paths: Sequence[str]) -> None:
    """Raises StepError if a module has arrays at these paths, and gets no state to bind."""
    if paths and model_state is None:
        why = f"has arrays of the module beside its parameters: {', '.join(paths[:3])}"
        fix = "model.bind(state.params, state.model_state)"
        raise StepError.of("The module cannot be bound.", "model_state", why, fix)


def accept_key(loss: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """Returns a loss of `(outputs, batch, key)` from one that may lack the key."""
    return loss if takes_argument(loss, 2) else lambda outputs, batch, key: loss(outputs, batch)


def takes_argument(loss: Callable[..., Any], index: int) -> bool:
    """Whether a function has a positional parameter at an index, without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(loss).parameters.values()
    except ValueError:  # a function of C
        return False
    named = [p for p in parameters if p.kind in kinds]
    return len(named) > index and named[index].default is inspect.Parameter.empty


def split_loss_output(out: Any) -> tuple[Any, dict[str, Any]]:
    """Returns `(loss, metrics)` from `loss` or `(loss, metrics)`."""
    return out if isinstance(out, tuple) else (out, {})


def pad_axes(value: Any, names: Sequence[str | None]) -> WithAxes:
    """Names the dims of an array; as in a `PartitionSpec`, dims after the last name have none."""
    return WithAxes(value, (*names, *[None] * (value.ndim - len(names))))


def nest(leaves: Iterable[tuple[Sequence[Any], Any]]) -> dict[str, Any]:
    """Returns nested dicts of leaves by the names on their paths."""
    tree: dict[str, Any] = {}
    for path, value in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = value
    return tree
