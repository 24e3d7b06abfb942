"""What ended a run of several processes, in one line."""

import dataclasses

from .._core.errors import ShardkitError

# Exit codes, after sysexits.h: another process failed (EX_UNAVAILABLE), this process is stuck
# (EX_SOFTWARE), or SIGTERM stopped it after a checkpoint, so that it can resume (EX_TEMPFAIL).
PEER_FAILED, STUCK, STOPPED = 69, 70, 75

CONNECTION_CLOSED = "killed, or cut off: its connection has closed"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The failure of one process, which ends all of them.

    >>> print(Failure(1, 2, 7, "ValueError: no such row"))
    process 1 of 2, step 7: ValueError: no such row
    """

    process: int  # number of the process
    count: int  # number of processes
    step: int  # last update that it reported to have dispatched; 0 for none
    cause: str  # what happened to it
    stuck: bool = False  # whether it is alive and makes no progress

    def __str__(self) -> str:
        where = f"step {self.step}" if self.step else "before its first step"
        return f"process {self.process} of {self.count}, {where}: {self.cause}"


def code_of(error: BaseException) -> int:
    """Returns the exit code of a process that ends with an error.

    >>> code_of(ShardkitError("no such axis")), code_of(OSError()), code_of(KeyboardInterrupt())
    (2, 1, 130)
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ShardkitError) else 1
