"""`Kind`: everything that the rest of the package knows of one kind of parallelism.

Ledger, findings, minima, errors, planner and sweeps iterate over a strategy's kinds and name none;
so a new kind is one file: a function that makes its strategy, and its final subclass of `Kind`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..report import AxisKind, Program, Row

if TYPE_CHECKING:
    from ._strategy import Strategy


def all_reduce_bytes(n: int, size: float) -> float:
    """Bytes that one of n devices sends to all-reduce an array on a ring.

    >>> all_reduce_bytes(8, 1000)
    1750.0
    """
    return 2 * (n - 1) / n * size


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a planner varies beside the sizes of axes; each kind reads what concerns it.

    Attributes:
      zero: ZeRO stage; 0 for none.
      attention: how attention looks along a split length; `""` where none is split.
      pipeline: options of a pipeline.
    """

    zero: int = 0
    attention: str = ""
    pipeline: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def format_call(call: "functools.partial[Strategy]") -> str:
    """The call of a function that makes a strategy, as code.

    >>> from shardkit.parallel import strategies
    >>> format_call(functools.partial(strategies.tensor, sequence=True))
    'sk.strategies.tensor(sequence=True)'
    """
    home, options = call.func.__module__, [f"{name}={v!r}" for name, v in call.keywords.items()]
    home = "sk.strategies" if home.startswith("shardkit.") else home
    return f"{home}.{call.func.__name__}({', '.join(options)})"


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one device holds on one mesh, as a planner resolved it; bytes.

    Attributes:
      sizes: mesh axis → size.
      batch: its share of the batch.
      gradients: its gradients in f32, split as the parameters are.
      regathered: what it sends to gather the parameters that it updated in parts.
    """

    sizes: Mapping[str, int]
    batch: float
    gradients: int
    regathered: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kind(AxisKind, abc.ABC):
    """One kind of parallelism over one mesh axis.

    Attributes:
      override: the part of a model that its strategy carries out and that the model has to mark;
        empty where it needs no mark.
      in_shard_map: whether `mode="shard_map"` carries it out.
      weighed: what a planner tries over the axis, in words; empty if it tries nothing there.
      not_weighed: its variants that a planner does not try, in words.
      told_by: what an axis splits of `"batch"`, `"params"` and `"opt_state"` where specs alone tell
        the kind; empty where they do not.
      make: the function that makes its strategy.
      by_default: whether a sweep may call it without options, for an axis that none is on.
    """

    override: ClassVar[str] = ""
    in_shard_map: ClassVar[bool] = False
    weighed: ClassVar[str] = ""
    not_weighed: ClassVar[tuple[str, ...]] = ()
    told_by: ClassVar[frozenset[str]] = frozenset()
    make: "ClassVar[Callable[..., Strategy]]"
    by_default: ClassVar[bool] = True

    @property
    def variant(self) -> str:
        """The option in which it differs from others of its name; empty for the usual one."""
        return ""

    def __str__(self) -> str:
        """Returns `tensor+sequence`, its name with its variant."""
        return f"{self.name}+{self.variant}" if self.variant else self.name

    def shares_axis(self, other: "Kind") -> bool:
        """Whether it may be on one mesh axis with another kind; it is enough that one says so."""
        del other
        return False

    def reduced_bytes(self, program: Program) -> float:
        """The one all-reduce per step of gradients of parameters that the axis does not split."""
        dtype = program.declared.reduce_dtype
        whole = program.param_bytes(self.axis, dtype, split=False)
        return all_reduce_bytes(program.sizes[self.axis], whole)

    def excess(
        self, row: Row, rows: Sequence[Row], program: Program
    ) -> Iterator[tuple[str, float]]:
        """Gradients that are not scattered, weights gathered again, where it splits them."""
        k = program.declared.accumulate
        if not self.splits & {"weights", "optimizer_state"}:
            return
        if row.kind == "all-reduce" and row.phase != "forward":
            yield "of gradients all-reduced, where a reduce-scatter would do", 0.5
        elif row.kind == "all-gather" and k > 1:
            yield f"of weights gathered again in each of {k} micro-batches", 1 - 1 / k

    def tried(self, choice: Choice) -> "functools.partial[Strategy]":
        """The strategy that a planner tries over the axis."""
        return functools.partial(self.make, **self.options(choice))

    def options(self, choice: Choice) -> Mapping[str, Any]:
        """Those of the strategy that a planner tries."""
        del choice
        return {}

    @property
    def choice(self) -> Choice:
        """Its own options, as a planner names them."""
        return Choice()

    @property
    def unmodelled(self) -> str:
        """Why a planner cannot estimate it; empty where it can."""
        return ""

    def sent_beside(self, held: DeviceBytes) -> float:
        """Bytes a device sends per step that a planner does not find by following names of dims."""
        del held
        return 0.0
