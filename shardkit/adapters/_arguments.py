"""The arguments of the adapters, checked before a library is called with them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .._core.batch_values import declaration_problems, to_abstract
from .._core.errors import Problem, StepError, raise_all
from .._core.signatures import call_problem
from .._core.types import Batch, PyTree

_HEADLINE = "The model is declared wrongly."


def check_model(problems: Iterable[Problem]) -> None:
    """Raises StepError with every problem of an adapter's arguments."""
    raise_all(StepError, _HEADLINE, list(problems))


def maker_problems(
    make_model: Any, argument: str, module: type | tuple[type, ...]
) -> Iterator[Problem]:
    """Problems of what is to be a function of one argument that makes a module.

    `module` is the base of the library's modules.
    """
    fix = f"lambda {argument}: Net(..., {argument}={argument})"
    if isinstance(make_model, module):
        why = f"is a module of class {type(make_model).__name__}, not a function that makes one"
        yield Problem("make_model", why, fix)
    elif not callable(make_model):
        why = f"is of type {type(make_model).__name__}, not a function that makes a module"
        yield Problem("make_model", why, fix)
    elif why := call_problem(make_model, (argument,)):
        yield Problem("make_model", why, fix)


def loss_problems(loss: Any, names: Sequence[str]) -> Iterator[Problem]:
    """Problems of a loss of these arguments, which may take a key behind them."""
    fix = f"def loss({', '.join(names)}): ...; or with a key behind"
    if not callable(loss):
        yield Problem("loss", f"is of type {type(loss).__name__}, not a function", fix)
    elif call_problem(loss, (*names, "key")) and (why := call_problem(loss, names)):
        yield Problem("loss", why, fix)


def take_inputs(batch: Batch, inputs: str | Sequence[str] | Callable[[Any], Any]) -> PyTree:
    """Returns the abstract batch of a declaration.

    Raises StepError with every leaf that is not an array, or every input that the batch lacks.
    """
    problems = list(declaration_problems(batch))
    if not problems and not callable(inputs):
        names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        known = [str(name) for name in batch] if isinstance(batch, Mapping) else []
        has = f"which has {', '.join(known)}" if known else f"of type {type(batch).__name__}"
        fix = f"inputs={known[0]!r}" if known else 'batch={"x": ...}'
        fix += "; or inputs=lambda batch: (batch[...], ...)"
        problems = [
            Problem(f"inputs={inputs!r}", f"{name!r} is not in the batch, {has}", fix)
            for name in names
            if name not in known
        ]
    check_model(problems)
    return to_abstract(batch)
