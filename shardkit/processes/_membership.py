"""Whether this process is one of several, from its environment alone."""

import dataclasses
import json
import os
from collections.abc import Mapping

# The launcher tells each process its place in here.
VARIABLE = "SHARDKIT_PROCESS"


@dataclasses.dataclass(frozen=True)
class Membership:
    """What the launcher tells a process that it starts.

    Attributes:
      index: number of the process.
      count: how many there are.
      coordinator: `host:port` of JAX's own service.
      hub: `host:port` where processes hear of each other.
      token: what who connects there has to know.
      control: descriptor of a socket to the launcher; it closes when the launcher is gone.
      listener: descriptor of the socket that listens at `hub`, in process 0.
      devices: simulated devices of each process, or None where that is the program's affair.
    """

    index: int
    count: int
    coordinator: str
    hub: str
    token: str
    control: int
    listener: int | None = None
    devices: int | None = None

    def to_text(self) -> str:
        """Returns what the environment holds."""
        return json.dumps(dataclasses.asdict(self))


def membership(environment: Mapping[str, str] = os.environ) -> Membership | None:
    """What the launcher told this process; None where no launcher started it."""
    text = environment.get(VARIABLE)
    return Membership(**json.loads(text)) if text else None


def detected_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of a cluster that started several processes, by the signs that JAX goes by too.

    JAX asks a machine's metadata service as well, which a run on one machine would wait for; so
    what has no sign in the environment is given one: `JAX_COORDINATOR_ADDRESS`.

    >>> detected_cluster({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:7", "OMPI_COMM_WORLD_SIZE":
    ...     "4"})
    'Open MPI'
    """
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    slurm = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    signs = {
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in environment,
        "SLURM": all(f"SLURM_{one}" in environment for one in slurm)
        and _number(environment, "SLURM_NTASKS") > 1,
        "Open MPI": "OMPI_MCA_orte_hnp_uri" in environment
        and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1,
        "Cloud TPU": "," in hosts or _number(environment, "MEGASCALE_NUM_SLICES") > 1,
        "Kubernetes": {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys(),
    }
    return next((name for name, seen in signs.items() if seen), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    return int(text) if text.isdigit() else 1


def process_count(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes the launcher has started; 1 where there is none, None if a cluster has.

    Known before JAX starts a backend, when devices are still to be simulated.
    """
    here = membership(environment)
    if here is not None:
        return here.count
    return 1 if detected_cluster(environment) is None else None
