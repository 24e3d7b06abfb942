"""What `shardkit launch` tells a process that it starts, in the environment."""

import dataclasses
import json
import os
from collections.abc import Mapping

# The launcher puts each process's `Membership` here.
VARIABLE = "SHARDKIT_PROCESS"


@dataclasses.dataclass(frozen=True)
class Membership:
    """What the launcher passes to a process that it starts.

    Attributes:
      index: number of the process.
      count: number of processes.
      jax_coordinator: `host:port` of JAX's coordination service.
      coordinator: `host:port` of shardkit's `Coordinator`.
      token: secret to present there.
      control: descriptor of a socket to the launcher; it closes when the launcher is gone.
      listener: descriptor of the socket that listens at `coordinator`, in process 0.
      devices: simulated devices of each process, or None if the program decides.
    """

    index: int
    count: int
    jax_coordinator: str
    coordinator: str
    token: str
    control: int
    listener: int | None = None
    devices: int | None = None

    def to_text(self) -> str:
        """Returns the text for the environment."""
        return json.dumps(dataclasses.asdict(self))


def membership(environment: Mapping[str, str] = os.environ) -> Membership | None:
    """Returns what the launcher passed to this process; None if it was not launched."""
    text = environment.get(VARIABLE)
    return Membership(**json.loads(text)) if text else None
