"""What ended a run of several processes, in one line."""

import dataclasses

from .._core.errors import ShardkitError

# Codes of processes that end themselves, from sysexits: what they need is gone, they are at fault
# themselves, or they were told to end, have saved, and can go on another time.
PEER_FAILED, STUCK, STOPPED = 69, 70, 75


@dataclasses.dataclass(frozen=True)
class Failure:
    """A process that cannot go on, and so none of the others can.

    Attributes:
      process: its number.
      count: how many processes there are.
      step: last update that it is known to have begun; 0 for none.
      cause: what happened to it.
      stuck: whether it is alive and does not go on.

    >>> print(Failure(1, 2, 7, "ValueError: no such row"))
    process 1 of 2, step 7: ValueError: no such row
    """

    process: int
    count: int
    step: int
    cause: str
    stuck: bool = False

    def __str__(self) -> str:
        """The first line that everybody reads."""
        where = f"step {self.step}" if self.step else "before its first step"
        return f"process {self.process} of {self.count}, {where}: {self.cause}"


def code_of(error: BaseException) -> int:
    """Exit code of a process that an error ends.

    >>> code_of(ShardkitError("no such axis")), code_of(OSError()), code_of(KeyboardInterrupt())
    (2, 1, 130)
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ShardkitError) else 1
