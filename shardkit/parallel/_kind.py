"""`Kind`: everything that the rest of the package knows of one kind of parallelism.

Ledger, findings, minima, errors, planner and sweeps iterate over a strategy's kinds and name none;
so a new kind is one file: a function that makes its strategy, and its final subclass of `Kind`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from ..inspect import AxisKind, Program, Row

if TYPE_CHECKING:
    from ._strategy import Strategy


def all_reduce_bytes(n: int, size: float) -> float:
    """Bytes that one of n devices sends to all-reduce an array on a ring.

    >>> all_reduce_bytes(8, 1000)
    1750.0
    """
    return 2 * (n - 1) / n * size


def scatter_excess(row: Row, program: Program) -> Iterator[tuple[str, float]]:
    """What goes beyond gradients that are scattered and weights that are gathered once.

    Args:
      row: a collective over the axis.
      program: declares how many micro-batches there are.
    """
    k = program.declared.accumulate
    if row.kind == "all-reduce" and row.phase != "forward":
        yield "of gradients all-reduced, where a reduce-scatter would do", 0.5
    elif row.kind == "all-gather" and k > 1:
        yield f"of weights gathered again in each of {k} micro-batches", 1 - 1 / k


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


@dataclasses.dataclass(frozen=True)
class StrategyCall:
    """A call of a function of `sk.strategies`; `str` gives it as code.

    Attributes:
      function: makes the strategy.
      options: its keyword arguments.
    """

    function: "Callable[..., Strategy]"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self) -> "Strategy":
        """Makes the strategy."""
        return self.function(**self.options)

    def __str__(self) -> str:
        """Returns `sk.strategies.tensor(sequence=True)`."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        home = self.function.__module__
        home = "sk.strategies" if home.startswith("shardkit.") else home
        return f"{home}.{self.function.__name__}({options})"


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
      region: the part of a model that its strategy carries out and that the model has to mark;
        empty where it needs no mark.
      in_shard_map: whether `mode="shard_map"` carries it out.
      weighed: what a planner tries over the axis, in words; empty if it tries nothing there.
      not_weighed: its variants that a planner does not try, in words.
    """

    region: ClassVar[str] = ""
    in_shard_map: ClassVar[bool] = False
    weighed: ClassVar[str] = ""
    not_weighed: ClassVar[tuple[str, ...]] = ()

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

    def is_told_by(self, split: Set[str]) -> bool:
        """Whether specs alone tell it.

        Args:
          split: what the axis splits of `"batch"`, `"params"` and `"opt_state"`.
        """
        del split
        return False

    def reduced_bytes(self, program: Program) -> float:
        """The one all-reduce per step of gradients of parameters that the axis does not split."""
        dtype = program.declared.reduce_dtype
        whole = program.param_bytes(self.axis, dtype, split=False)
        return all_reduce_bytes(program.sizes[self.axis], whole)

    def by_default(self) -> "StrategyCall | None":
        """What a sweep lays out an axis of this name by; None where options have to be given."""
        return None

    def tried(self, choice: Choice) -> StrategyCall:
        """What a planner tries over the axis; a kind that is `weighed` has to say it."""
        raise NotImplementedError(f"{self} is not tried by a planner")

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
