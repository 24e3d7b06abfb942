"""What `shardkit launch` tells a process that it starts, in the environment."""

import dataclasses
import json
import os
from collections.abc import Mapping

# The launcher puts each process's `Membership` here.
VARIABLE = "SHARDKIT_PROCESS"


@dataclasses.dataclass(frozen=True)
class Membership:
    """What the launcher passes to a process that it starts."""

    index: int  # number of the process
    count: int  # number of processes
    jax_coordinator: str  # `host:port` of JAX's coordination service
    coordinator: str  # `host:port` of shardkit's `Coordinator`
    token: str  # secret to present there
    control: int  # descriptor of a socket to the launcher; it closes when the launcher is gone
    # descriptor of the socket that listens at `coordinator`, in process 0
    listener: int | None = None
    devices: int | None = None  # simulated devices of each process, or None if the program decides

    def to_text(self) -> str:
        """Returns the text for the environment."""
        return json.dumps(dataclasses.asdict(self))


def membership(environment: Mapping[str, str] = os.environ) -> Membership | None:
    """Returns what the launcher passed to this process; None if it was not launched."""
    text = environment.get(VARIABLE)
    return Membership(**json.loads(text)) if text else None
