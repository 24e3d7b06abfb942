"""What is wrong in the fields of a `StepSpec`, found without a mesh."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import optax

from .._core.batch_values import declaration_problems
from .._core.errors import Problem, StepError, did_you_mean
from .._core.options import option_problems
from .._core.precision import Precision
from ..parallel import Strategy
from ._batch_rows import row_dim_problems
from ._executable_checks import OnMiscompiled
from ._nonfinite import ON_NONFINITE
from ._trainable import is_trainable
from ._user_functions import function_problems

if TYPE_CHECKING:
    from ._spec import StepSpec

Mode = Literal["auto", "shard_map"]
OnRetrace = Literal["warn", "error"]
_CHOICES = {
    "mode": get_args(Mode),
    "on_nonfinite": ON_NONFINITE,
    "on_retrace": get_args(OnRetrace),
    "on_miscompiled": get_args(OnMiscompiled),
}


def type_problems(spec: "StepSpec") -> Iterator[Problem]:
    """Fields of the wrong type."""
    is_chain = isinstance(spec.optimizer, optax.GradientTransformation)
    rows = (
        ("loss_fn", callable(spec.loss_fn), "def loss_fn(params, batch, key): ..."),
        ("optimizer", is_chain, _optimizer_fix(spec.optimizer)),
        ("init", callable(spec.init), "def init(key): return params"),
        ("strategy", isinstance(spec.strategy, Strategy), _strategy_fix(spec.strategy)),
        ("compiler_options", isinstance(spec.compiler_options, Mapping), '{"xla_option": True}'),
        ("trainable", is_trainable(spec.trainable), '"lora/**", or lambda path: "lora" in path'),
    )
    for name, is_right, fix in rows:
        if not is_right:
            yield Problem(name, f"is of type {type_name(getattr(spec, name))}", fix)
    if isinstance(spec.compiler_options, Mapping):
        options = (dict(spec.compiler_options), Mapping[str, Any])
        yield from option_problems(compiler_options=options)
    yield from function_problems(spec)
    yield from option_problems(
        deterministic=(spec.deterministic, bool),
        debug=(spec.debug, bool),
        independent_rows=(spec.independent_rows, bool),
        owners=(spec.owners, bool | None),
    )


def _strategy_fix(strategy: Any) -> str:
    if isinstance(strategy, str) or callable(strategy):
        return "sk.strategies.fsdp(), called; or another of them, joined by |"
    return "sk.Strategy(params=...)"


def _optimizer_fix(optimizer: Any) -> str:
    if isinstance(optimizer, optax.MultiSteps):
        return "optax.MultiSteps(...).gradient_transformation()"
    if isinstance(optimizer, list | tuple):
        return "optax.chain(*optimizers)"
    if isinstance(optimizer, Mapping):
        return "optax.multi_transform(optimizers, labels)"
    return "optax.adamw(1e-3), called"


def choice_problems(spec: "StepSpec") -> Iterator[Problem]:
    """Fields that have none of the values that they may have."""
    for field, known in _CHOICES.items():
        if (named := getattr(spec, field)) not in known:
            why = f"known: {', '.join(known)}.{did_you_mean(str(named), known)}"
            yield Problem(f"{field}={named!r}", why, f'{field}="{known[0]}"')


def batch_problems(spec: "StepSpec") -> Iterator[Problem]:
    """Leaves of the batch that are no arrays of numbers, or whose rows are unclear."""
    wrong = list(declaration_problems(spec.batch))
    yield from wrong or row_dim_problems(spec.batch, spec.row_dims)


def strategy_problems(
    spec: "StepSpec", readers: Mapping[str, Callable[[Any], Any]]
) -> list[Problem]:
    """Invalid options of the strategy, and combinations that do not work.

    `readers` read an option of this name in any accepted form.
    """
    problems = [
        problem
        for name, read in readers.items()
        for problem in _reader_problems(name, read, getattr(spec.strategy, name))
    ]
    compression = spec.strategy.compression
    if compression is not None and spec.mode != "shard_map":
        why = f"sums gradients over {compression.axis!r} itself; here the partitioner sums them"
        problems.append(Problem("compression", why, 'mode="shard_map"'))
    return problems


def _reader_problems(name: str, read: Callable[[Any], Any], value: Any) -> Iterator[Problem]:
    """The problems in the error that an option's reader raises."""
    if name != "accumulate" and not isinstance(value, str | Precision):
        yield Problem(f"{name}={value!r}", f"is of type {type_name(value)}", f'{name}="..."')
        return
    try:
        read(value)
    except StepError as error:
        text, _, fix = str(error).partition("\nFix: ")
        _, *rows = text.splitlines()
        for row in rows:
            subject, _, why = row.strip().partition("  ")
            yield Problem(subject, why.strip(), fix)


def type_name(value: Any) -> str:
    """Name of the type of a value."""
    return type(value).__name__
