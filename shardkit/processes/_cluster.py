"""Finds out from the environment whether a cluster has started this process as one of several."""

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from .._core.errors import Problem, ProcessError, raise_all
from ._membership import membership

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_BY_HAND = f"{_ADDRESS}=HOST:PORT {_COUNT}=4 {_INDEX}=0, or none of them"
_MPI_INDEX, _MPI_COUNT = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
# JAX takes a port from here on by the number of the job.
_FIRST_PORT = 2**16 - 2**12
_MPI_LOCAL, _MPI_SERVER = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"
# Number and count of processes.
_NUMBERS = {
    "JAX": (_INDEX, _COUNT),
    # JAX asks in this order: mpirun in a job of SLURM sets the variables of both.
    "Open MPI": (_MPI_INDEX, _MPI_COUNT),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS"),
}


def detected_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the name of a cluster that started several processes, by the variables JAX reads.

    JAX also asks the machine's metadata service, for which a run on one machine would wait. On a
    cluster without variables in the environment, set `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    >>> detected_cluster({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:7", "OMPI_COMM_WORLD_SIZE":
    ...     "4"})
    'Open MPI'
    """
    slurm = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    signs = {
        _ADDRESS: _ADDRESS in environment,
        "Open MPI": _MPI_SERVER in environment and _number(environment, _MPI_COUNT) > 1,
        "SLURM": all(f"SLURM_{name}" in environment for name in slurm)
        and _number(environment, "SLURM_NTASKS") > 1,
        "Cloud TPU": len(_tpu_hosts(environment)) > 1
        or _number(environment, "MEGASCALE_NUM_SLICES") > 1,
        "Kubernetes": {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys(),
    }
    return next((name for name, present in signs.items() if present), None)


def process_of_cluster(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns number and count of processes where the cluster tells them, else (0, 1).

    >>> process_of_cluster({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"})
    (3, 4)
    >>> process_of_cluster({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"})
    (1, 2)
    """
    for names in _NUMBERS.values():
        if all(name in environment for name in names):
            return _number(environment, names[0]), _number(environment, names[1])
    hosts, slices = _tpu_hosts(environment), _number(environment, "MEGASCALE_NUM_SLICES")
    if not hosts or "TPU_WORKER_ID" not in environment:
        return 0, 1
    slice_index = _number(environment, "MEGASCALE_SLICE_ID", 0)
    index = _number(environment, "TPU_WORKER_ID") + slice_index * len(hosts)
    return index, slices * len(hosts)


def process_count(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns the number of processes: 1 for one alone, None on a cluster that does not tell it.

    It works before JAX starts a backend, when devices can still be simulated.

    >>> process_count({})
    1
    """
    launched = membership(environment)
    if launched is not None:
        return launched.count
    if detected_cluster(environment) is None:
        return 1
    count = process_of_cluster(environment)[1]
    return count if count > 1 else None


def initialize_arguments(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Returns what `jax.distributed.initialize` does not read from the environment itself.

    >>> sorted(initialize_arguments({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}).items())
    [('cluster_detection_method', 'deactivate'), ('num_processes', 2), ('process_id', 1)]
    """
    by_hand = _COUNT in environment or _INDEX in environment
    if not by_hand and not _is_new_mpi(environment):
        return {}
    index, count = process_of_cluster(environment)
    # An actor of Ray in a job of SLURM has SLURM's variables too, which are not about it.
    arguments: dict[str, Any] = {"num_processes": count, "process_id": index}
    if not by_hand and _MPI_LOCAL in environment:
        arguments["local_device_ids"] = [_number(environment, _MPI_LOCAL)]
    return {**arguments, "cluster_detection_method": "deactivate"}


def coordinator_address(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Returns host of process 0, and a port, where variables tell the host; as JAX reads them.

    >>> coordinator_address({"JAX_COORDINATOR_ADDRESS": "node-1:8476"})
    ('node-1', 8476)
    >>> coordinator_address({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[03-05,9],login"})
    ('n03', 61447)
    """
    host, _, port = environment.get(_ADDRESS, "").rpartition(":")
    if host and port.isdigit():
        return host.strip("[]"), int(port)
    # Two jobs on one host have two ports; JAX's own of this number is of TCP.
    mpi = re.match(
        r"(\d+)\..*?tcp6?://\[?([^],]+?)(?:[],]|:\d+$)", environment.get(_MPI_SERVER, "")
    )
    if mpi is not None:
        return mpi[2], _FIRST_PORT + int(mpi[1]) // 2**12 % 2**12
    hosts = _slurm_hosts(environment)
    if not hosts:
        return None
    return hosts[0], _FIRST_PORT + _number(environment, "SLURM_JOB_ID") % 2**12


def host_of_process(index: int, environment: Mapping[str, str] = os.environ) -> str:
    """Returns the host of a process where the variables of SLURM tell it, else "".

    >>> names = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_NTASKS")
    >>> job = dict(zip(names, ("n[1-2],gpu", "2(x2),1", "0", "5")))
    >>> [host_of_process(i, job) for i in range(6)]
    ['n1', 'n1', 'n2', 'n2', 'gpu', '']
    """
    # Other clusters tell no hosts, and the variables of SLURM around them are not of their ranks.
    if any(name in environment for name in (_INDEX, _MPI_INDEX)):
        return ""
    # `srun` fills one host after the other, unless it is told otherwise.
    if not environment.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return ""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    counts = [int(number) for number, times in runs for _ in range(int(times or 1))]
    hosts = _slurm_hosts(environment)
    if len(counts) != len(hosts):
        return ""
    hosts = [host for host, number in zip(hosts, counts, strict=True) for _ in range(number)]
    return hosts[index] if index < len(hosts) else ""


def _slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    """Expands `n[1-2,07],gpu` to `n1 n2 n07 gpu`; what is none such list, to nothing."""
    hosts = []
    for prefix, ranges, suffix in re.findall(
        r"([^][,]+)(?:\[([^]]*)\]([^][,]*))?", environment.get("SLURM_STEP_NODELIST", "")
    ):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last) + 1) if first.isdigit() and last.isdigit() else ()
            names = [f"{n:0{len(first)}}" for n in numbers] if last else [first]
            hosts += [f"{prefix}{name}{suffix}" for name in names]
    return hosts


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ProcessError unless the environment names a cluster completely, or none.

    It lists every variable that is missing or contradicts another. JAX would ignore it, and each
    process would train alone.
    """
    problems = [*_numbers_problems(environment), *_incomplete(environment)]
    raise_all(ProcessError, "The environment names half a cluster.", problems)


def check_port(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ProcessError in process 0 if the port of `JAX_COORDINATOR_ADDRESS` is taken.

    JAX would end by a segmentation fault.
    """
    address = environment.get(_ADDRESS)
    if address is None or process_of_cluster(environment)[0] != 0:
        return
    try:
        # It may still be in the TIME_WAIT of a run before, which this allows.
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        problem = Problem(f"{_ADDRESS}={address}", f"process 0 cannot listen there: {error}")
        fix = f"another port in {_ADDRESS}, the same in every process"
        raise_all(ProcessError, "The processes cannot be joined.", [problem], fix)


def alone_in_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns what to warn of where a job of several tasks runs one process without `srun`.

    >>> print(alone_in_job({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}))
    SLURM job 7 has 2 tasks, and this process runs alone: start it by srun to join them.
    """
    tasks = _number(environment, "SLURM_NTASKS")
    job = environment.get("SLURM_JOB_ID")
    if job is None or tasks < 2 or detected_cluster(environment) is not None:
        return None
    why = f"SLURM job {job} has {tasks} tasks, and this process runs alone"
    return f"{why}: start it by srun to join them."


def _numbers_problems(environment: Mapping[str, str]) -> list[Problem]:
    problems = []
    for cluster, (index, count) in _NUMBERS.items():
        values = {name: environment[name] for name in (index, count) if name in environment}
        for name, text in values.items():
            if not text.isdigit():
                problems.append(Problem(f"{name}={text}", "is not a whole number.", f"{name}=1"))
        if len(values) == 1 and cluster == "JAX":
            ((name, text),) = values.items()
            missing = index if name == count else count
            problems.append(Problem(f"{name}={text}", f"needs {missing} beside it.", _BY_HAND))
        if len(values) == 2 and all(text.isdigit() for text in values.values()):
            number, most = int(values[index]), int(values[count])
            if number >= most:
                why = f"must be less than {count}={most}."
                problems.append(Problem(f"{index}={number}", why, f"{index}=0"))
    return problems


def _incomplete(environment: Mapping[str, str]) -> list[Problem]:
    problems, address = [], environment.get(_ADDRESS)
    others = detected_cluster({k: v for k, v in environment.items() if k != _ADDRESS})
    counted = _COUNT in environment or _INDEX in environment or _is_new_mpi(environment)
    if address is None and (_COUNT in environment or _INDEX in environment):
        name = _COUNT if _COUNT in environment else _INDEX
        subject = f"{name}={environment[name]}"
        problems.append(Problem(subject, f"needs {_ADDRESS} beside it.", _BY_HAND))
    elif address is None and _is_new_mpi(environment):
        why = "is from an Open MPI that does not say where process 0 is (5 or newer)."
        subject = f"{_MPI_COUNT}={environment[_MPI_COUNT]}"
        problems.append(Problem(subject, why, f"mpirun -x {_ADDRESS}=HOST:PORT ..."))
    elif address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            why = "is not the HOST:PORT of process 0."
            problems.append(Problem(f"{_ADDRESS}={address}", why, f"{_ADDRESS}=localhost:8476"))
        if others is None and not counted:
            why = f"needs {_COUNT} and {_INDEX} beside it: no cluster tells them."
            problems.append(Problem(f"{_ADDRESS}={address}", why, _BY_HAND))
    if counted or others is None:
        return problems
    hosts = ",".join(_tpu_hosts(environment))
    if others == "Cloud TPU" and hosts and "TPU_WORKER_ID" not in environment:
        subject = f"TPU_WORKER_HOSTNAMES={hosts}"
        problems.append(Problem(subject, "needs TPU_WORKER_ID beside it.", "TPU_WORKER_ID=0"))
    elif others == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        why = "JAX finds the other pods of a job by the package kubernetes, which is not installed."
        fix = f"pip install 'jax[k8s]'; or {_BY_HAND.removesuffix(', or none of them')}"
        problems.append(Problem("JOB_COMPLETION_INDEX", why, fix))
    return problems


def _is_new_mpi(environment: Mapping[str, str]) -> bool:
    """Whether `mpirun` of Open MPI 5 has started several: it does not tell what JAX reads."""
    return _MPI_SERVER not in environment and _number(environment, _MPI_COUNT) > 1


def _tpu_hosts(environment: Mapping[str, str]) -> list[str]:
    text = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return text.split(",") if text else []


def _number(environment: Mapping[str, str], name: str, default: int = 1) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else default
