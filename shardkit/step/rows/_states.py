"""What a value of a traced function has to do with the rows of its batch.

Every value is in one of these states; `n` is the number of rows:

| state | the value | example |
|---|---|---|
| `AlwaysZero()` | zero, neutral in sums | a gradient's first accumulator |
| `Constant(d)` | no row decides it; it grows as `n**d` | a weight, `0`; `1 / n`, `-1` |
| `PerRow(dim, ...)` | along `dim`, each row's part depends on that row alone | `x @ w` |
| `RowSum(d)` | a sum over rows, times a constant; grows as `n**d` | `x.sum()`: 1, `x.mean()`: 0 |
| `Mixed(cause)` | rows decide it together in another way | `(x - x.mean(0)) ** 2` |

A mean of rows is a `RowSum(0)`: computed on equal shards of the rows and averaged, it is the same
number. A `RowSum(1)` is the same where the shards are added up.
"""

import dataclasses

from ..._core.errors import count

Degree = int | None
"""The power of the number of rows that a value grows with; None: it depends on it otherwise."""


@dataclasses.dataclass(frozen=True)
class Cause:
    """The operation that mixed rows."""

    operation: str  # the primitive's name
    why: str  # what it does with rows, as the end of a sentence
    where: str = ""  # the user's `file:line in function`, or "" where none is known
    code: str = ""  # the statement on that line, or ""
    # a sum over rows was divided by another one, as in a mean over valid tokens
    ratio: bool = False
    guard: bool = False  # a sum over rows is kept from being zero, as a denominator is
    fix: str = ""  # how to write the same so that rows can be split, or ""

    def __str__(self) -> str:
        return f"{self.operation} {self.why}" + (f" ({self.where})" if self.where else "")


@dataclasses.dataclass(frozen=True)
class AlwaysZero:
    """AlwaysZero, whatever the rows are."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that no row decides, and that is alike for every row; it grows as `n**degree`."""

    degree: Degree = 0


@dataclasses.dataclass(frozen=True)
class PerRow:
    """A value whose part for a row depends on this row alone."""

    # the dim that holds the rows. It may hold more than them: its size is `outer · n · inner`, and
    # element `(o · n + row) · inner + i` belongs to `row`. So `[batch, length]` reshaped to
    # `[batch · length]` has `inner = length`, and two views of a batch one behind another,
    # `[2 · batch]`, have `outer = 2`.
    dim: int
    outer: int = 1  # blocks of all rows
    inner: int = 1  # elements of each row, side by side
    degree: Degree = 0  # each row's part grows as `n**degree`
    # `"values"`; or, of an `iota` over rows, `"index"`: the row's own number, `"shifted"`: that
    # plus something, `"test"`: whether it is negative. JAX's indexing makes these three of
    # `x[jnp.arange(n), labels]`; as data they would depend on a row's place in the batch.
    role: str = "values"

    @property
    def layout(self) -> tuple[int, int, int]:
        """Where the rows are: values of one layout have each row at the same place."""
        return self.dim, self.outer, self.inner


@dataclasses.dataclass(frozen=True)
class Columns:
    """Indices side by side along the last dim, as `gather` takes them: one state for each."""

    parts: tuple["State", ...]


@dataclasses.dataclass(frozen=True)
class RowSum:
    """A sum over rows of what depends on one row each, times a constant."""

    degree: Degree = 1  # of the whole: 1 for `x.sum()`, 0 for `x.mean()`


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A value that rows decide together, but not as a sum over them."""

    cause: Cause


State = AlwaysZero | Constant | PerRow | Columns | RowSum | Mixed


def add_degrees(*degrees: Degree) -> Degree:
    """The degree of a product."""
    return None if None in degrees else sum(d for d in degrees if d is not None)


def same_degree(*degrees: Degree) -> Degree:
    """The degree of a sum: that of all its terms, or None."""
    return degrees[0] if len(set(degrees)) == 1 else None


def describe(state: State) -> str:
    """A state in words, for an error.

    >>> describe(RowSum(1)), describe(RowSum(0))
    ('a sum over rows', 'a mean of rows')
    """
    match state:
        case RowSum(0):
            return "a mean of rows"
        case RowSum(1):
            return "a sum over rows"
        case RowSum(None):
            return "a sum over rows, scaled by something that depends on their number"
        case RowSum(degree):
            return f"a sum over rows, divided by their number {count(1 - (degree or 0), 'time')}"
        case PerRow():
            return "one value a row"
        case Mixed(cause):
            return str(cause)
        case Constant(0) | AlwaysZero():
            return "the same for any rows"
    return "a number that depends on how many rows there are"
