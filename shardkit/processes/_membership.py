"""Finds out from the environment whether this process is one of several."""

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


def detected_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the name of a cluster that started several processes, by the variables JAX reads.

    JAX also asks the machine's metadata service, for which a run on one machine would wait. On a
    cluster without variables in the environment, set `JAX_COORDINATOR_ADDRESS`.

    >>> detected_cluster({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:7", "OMPI_COMM_WORLD_SIZE":
    ...     "4"})
    'Open MPI'
    """
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    slurm = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    signs = {
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in environment,
        "SLURM": all(f"SLURM_{name}" in environment for name in slurm)
        and _number(environment, "SLURM_NTASKS") > 1,
        "Open MPI": "OMPI_MCA_orte_hnp_uri" in environment
        and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1,
        "Cloud TPU": "," in hosts or _number(environment, "MEGASCALE_NUM_SLICES") > 1,
        "Kubernetes": {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys(),
    }
    return next((name for name, present in signs.items() if present), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    return int(text) if text.isdigit() else 1


def process_count(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns the number of processes: 1 without a launcher, None on a cluster.

    It works before JAX starts a backend, when devices can still be simulated.
    """
    launched = membership(environment)
    if launched is not None:
        return launched.count
    return 1 if detected_cluster(environment) is None else None
