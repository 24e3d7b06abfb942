"""What every adapter returns."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from .._core.types import Loss


@dataclasses.dataclass(frozen=True)
class Model:
    """A library's module in the form that `compile_step` takes.

    Attributes:
      init: `key -> params` or `key -> sk.Variables`, with the logical axes that the module names.
      loss_fn: the loss in its training and evaluation forms.
      bind: `(params, model_state={}) -> ` the module itself with these arrays, in evaluation
        mode: an
        nnx module, or for linen a function of the module's inputs.
    """

    init: Callable[[Any], Any]
    loss_fn: Loss
    bind: Callable[..., Any]


def accept_key(loss: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """Lets a loss of two arguments be called with three: the key is the last one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p for p in inspect.signature(loss).parameters.values() if p.kind in kinds]
    wants_key = len(names) >= 3 and names[2].default is inspect.Parameter.empty
    return loss if wants_key else lambda subject, batch, key: loss(subject, batch)


def split_loss_output(out: Any) -> tuple[Any, dict[str, Any]]:
    """`loss` or `(loss, metrics)` as a pair."""
    return out if isinstance(out, tuple) else (out, {})
