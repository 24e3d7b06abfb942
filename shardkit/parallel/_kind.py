"""`Kind`: everything that the rest of the package knows of one kind of parallelism.

Reports, errors, the planner and sweeps iterate over `strategy.kinds` and name none of them, so a
new kind is one file: a function that makes its strategy, and its final subclass of `Kind`.

| define | used for |
| --- | --- |
| `name`, and an axis when it is made | every table and message; one kind per mesh axis |
| `splits` | which axes hold rows, weights, layers … (planner, ledger, composition) |
| `collectives` | collectives over the axis that are expected; others are findings |
| `minimum` | the ledger's ratio of bytes sent to the textbook's |
| `factory` | the call that planner and sweeps print and make |
| `excess`, `gathered_activations`, `activation_fix` | why bytes exceed the minimum, and the fix |
| `override` | the error when the model never calls the part that it overrides |
| `in_shard_map` | whether `mode="shard_map"` accepts it |
| `planned`, `not_planned`, `planned_options`, `plan_choice` | what `sk.plan` tries over the axis |
| `extra_bytes`, `unmodelled_reason` | what the planner's estimate lacks |
| `implied_by` | naming the axis of a strategy that has only specs |

Only the first five must be defined. `tests/test_toy_kind.py` is a complete example; to make a kind
known to planner and sweeps, list it in `_kinds`, or use `register_kind`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..report import AxisKind, LedgerRow, Program

if TYPE_CHECKING:
    from ._strategy import Strategy


def all_reduce_bytes(n: int, size: float) -> float:
    """Bytes that one of n devices sends to all-reduce an array on a ring.

    >>> all_reduce_bytes(8, 1000)
    1750.0
    """
    return 2 * (n - 1) / n * size


def spare_share(row: LedgerRow, rows: Sequence[LedgerRow], least: float) -> float:
    """The share beyond a minimum of what all collectives of a row's sort send together.

    `least` is bytes that those of its sort must send.
    """
    sent = sum(other.wire_bytes for other in rows if other.kind == row.kind)
    return max(0.0, 1 - least / sent) if sent else 0.0


@dataclasses.dataclass(frozen=True)
class PlanChoice:
    """What a planner varies besides the sizes of axes; each kind reads what concerns it."""

    zero: int = 0  # ZeRO stage; 0 for none
    attention: str = ""  # how attention exchanges a split length; `""` where no length is split
    pipeline: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of a pipeline


def format_call(call: "functools.partial[Strategy]") -> str:
    """Formats the call of a function that makes a strategy, as code.

    >>> from shardkit.parallel import strategies
    >>> format_call(functools.partial(strategies.tensor, sequence=True))
    'sk.strategies.tensor(sequence=True)'
    """
    module, options = call.func.__module__, [f"{name}={v!r}" for name, v in call.keywords.items()]
    module = "sk.strategies" if module.startswith("shardkit.") else module
    return f"{module}.{call.func.__name__}({', '.join(options)})"


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one device holds on one mesh, as a planner resolved it; bytes."""

    sizes: Mapping[str, int]  # mesh axis → size
    batch: float  # its share of the batch
    gradients: int  # its gradients in f32, split as the parameters are
    regathered: float = 0.0  # what it sends to gather parameters whose update was split


@dataclasses.dataclass(frozen=True)
class Kind(AxisKind, abc.ABC):
    """One kind of parallelism over one mesh axis; see the module's table.

    Attributes:
      override: name of the part of a model that its strategy overrides and that the model must
        therefore call, such as `"attention"` for `sk.nn.attention`; empty where it needs none.
      in_shard_map: whether `mode="shard_map"` supports it.
      planned: what a planner tries over the axis, in words; empty if it tries nothing there.
      not_planned: its variants that a planner does not try, in words.
      implied_by: which of `"batch"`, `"params"` and `"opt_state"` an axis splits where specs alone
        determine the kind; empty where they do not.
      factory: the function that makes its strategy.
      sweep_by_default: whether a sweep may call the factory without options, for an axis that no
        strategy uses.
    """

    override: ClassVar[str] = ""
    in_shard_map: ClassVar[bool] = False
    planned: ClassVar[str] = ""
    not_planned: ClassVar[tuple[str, ...]] = ()
    implied_by: ClassVar[frozenset[str]] = frozenset()
    factory: "ClassVar[Callable[..., Strategy]]"
    sweep_by_default: ClassVar[bool] = True

    @property
    def variant(self) -> str:
        """The option in which it differs from others of its name; empty for the default."""
        return ""

    def __str__(self) -> str:
        """Returns `tensor+sequence`, its name with its variant."""
        return f"{self.name}+{self.variant}" if self.variant else self.name

    def shares_axis(self, other: "Kind") -> bool:
        """Whether it can be on one mesh axis with another kind; one of the two must say so."""
        del other
        return False

    def gradient_all_reduce_bytes(self, program: Program) -> float:
        """Bytes of one all-reduce per step of the gradients of what the axis does not split."""
        dtype = program.declared.reduce_dtype
        gradients = program.param_bytes(self.axis, dtype, split=False, trained=True)
        return all_reduce_bytes(program.sizes[self.axis], gradients)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """Gradients that are not scattered and weights gathered again, where it splits these."""
        k = program.declared.accumulate
        if not self.splits & {"weights", "optimizer_state"}:
            return
        if row.kind == "all-reduce" and row.phase != "forward":
            yield "of gradients all-reduced, where a reduce-scatter would do", 0.5
        elif row.kind == "all-gather" and k > 1:
            yield f"of weights gathered again in each of {k} micro-batches", 1 - 1 / k

    def planned_strategy(self, choice: PlanChoice) -> "functools.partial[Strategy]":
        """The strategy that a planner tries over the axis, as a call of its factory."""
        return functools.partial(self.factory, **self.planned_options(choice))

    def planned_options(self, choice: PlanChoice) -> Mapping[str, Any]:
        """Keyword arguments of that call."""
        del choice
        return {}

    @property
    def plan_choice(self) -> PlanChoice:
        """Its own options, as a planner names them."""
        return PlanChoice()

    @property
    def unmodelled_reason(self) -> str:
        """Why a planner cannot estimate it; empty where it can."""
        return ""

    def extra_bytes(self, held: DeviceBytes) -> float:
        """Bytes sent per device and step that do not follow from the names of dims."""
        del held
        return 0.0
