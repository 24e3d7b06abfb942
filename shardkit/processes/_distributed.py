"""`distributed`: initializes JAX for several processes, and connects them to a `Coordinator`."""

import contextlib
import os
import secrets
import socket
import threading
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._core.errors import Problem, ProcessError, first_line, format_problems
from .._core.options import check_arguments
from ._cluster import (
    alone_in_job,
    check_environment,
    check_port,
    detected_cluster,
    initialize_arguments,
    process_of_cluster,
)
from ._coordinator import Coordinator
from ._failure import PEER_FAILED
from ._membership import Membership, membership
from ._message_stream import MessageStream, address_of, connect, listen
from ._process_group import ProcessGroup
from ._roll_call import RollCall

# Address at which the others reach process 0; by default its host name.
HOST = "SHARDKIT_COORDINATOR_HOST"
_ADDRESS_BYTES = 256


def distributed(*, step_timeout: float = 0.0, start_timeout: float = 300.0) -> ProcessGroup:
    """Joins the processes that run this program, if there are several.

    Call it before JAX starts a backend. If `shardkit launch` or a cluster (SLURM, Open MPI,
    Cloud TPU, Kubernetes) has started several processes, it calls `jax.distributed.initialize`,
    so that `jax.devices()` lists the devices of all of them, and connects each process to
    process 0. Elsewhere `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` in the
    environment say so. When a process dies, raises or hangs, the others end within two seconds,
    each with one line that names it. In a single process it only watches the step timeout.

    Process 0 listens on one address only: the loopback if `shardkit launch` started it, else that
    of its host name or of `SHARDKIT_COORDINATOR_HOST`. Who connects there must present a random
    token of this run before a byte is parsed. Messages are not encrypted.

        with sk.distributed(step_timeout=60) as process_group:
            step = sk.compile_step(...)
            process_group.agree("step", program=step.program.digest, seed=seed)
            for i in range(steps):
                state, metrics = step(state, batch(i))
                process_group.report_step(i + 1)

    Args:
      step_timeout: seconds without an event of the loop after which a process counts as stuck;
        0 for no limit.
      start_timeout: seconds that the first process waits for the last one; then all that wait end,
        each with one line that names a process that has not come, and its host if SLURM tells it.

    Returns:
      A context manager; an exception that leaves its block is reported to the other processes.

    Raises:
      ProcessError: the processes cannot be joined, or the environment names half a cluster.
    """
    check_arguments(
        ProcessError,
        "The processes cannot be joined.",
        step_timeout=(step_timeout, float),
        start_timeout=(start_timeout, float),
    )
    if jax.distributed.is_initialized():
        return _join_initialized(step_timeout, start_timeout)
    launched = membership()
    if launched is not None:
        return _join_launched(launched, step_timeout, start_timeout)
    check_environment()
    cluster = detected_cluster()
    if cluster is not None:
        check_port()
        timeout = round(start_timeout) + 60
        with _start_deadline(start_timeout, *process_of_cluster()):
            _initialize(f"of {cluster}", initialization_timeout=timeout, **initialize_arguments())
        return _join_initialized(step_timeout, start_timeout)
    if warning := alone_in_job():
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return _watch_alone(step_timeout, start_timeout)


def _watch_alone(step_timeout: float, start_timeout: float) -> ProcessGroup:
    if not step_timeout:
        return ProcessGroup()
    token = secrets.token_hex()
    coordinator = Coordinator(None, 1, token, start_timeout)
    return ProcessGroup(
        stream=coordinator.stream, coordinator=coordinator, token=token, step_timeout=step_timeout
    )


def _join_launched(launched: Membership, step_timeout: float, start_timeout: float) -> ProcessGroup:
    coordinator = None
    if launched.listener is not None:
        listener = socket.socket(fileno=launched.listener)
        coordinator = Coordinator(listener, launched.count, launched.token, start_timeout)
    group = ProcessGroup(
        index=launched.index,
        count=launched.count,
        stream=coordinator.stream if coordinator else _connect(launched.coordinator, start_timeout),
        coordinator=coordinator,
        token=launched.token,
        launcher=MessageStream(socket.socket(fileno=launched.control)),
        step_timeout=step_timeout,
    )
    # Whoever does not come is named here; JAX would abort with a stack of C++.
    group.gather("join", None)
    try:
        _initialize(
            "that the launcher has started",
            coordinator_address=launched.jax_coordinator,
            num_processes=launched.count,
            process_id=launched.index,
            coordinator_bind_address=launched.jax_coordinator,
            initialization_timeout=round(start_timeout),
        )
    except ProcessError as error:
        group.fail(error)
        raise
    return group


@contextlib.contextmanager
def _start_deadline(seconds: float, index: int, count: int) -> Iterator[None]:
    """Ends this process if the others have not joined in time: JAX would abort with a C++ stack."""
    with RollCall(index, count, seconds) as roll_call:

        def give_up() -> None:
            os.write(2, f"{roll_call.failure()}\n".encode())
            os._exit(PEER_FAILED)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _join_initialized(step_timeout: float, start_timeout: float) -> ProcessGroup:
    """Joins the processes of an initialized JAX; process 0 broadcasts its address over devices."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return _watch_alone(step_timeout, start_timeout)
    coordinator, text = None, ""
    if index == 0:
        listener = _listen(os.environ.get(HOST, socket.gethostname()))
        token = secrets.token_hex()
        coordinator = Coordinator(listener, count, token, start_timeout)
        text = f"{token} {address_of(listener)}"
    sent = np.frombuffer(text.ljust(_ADDRESS_BYTES).encode(), np.uint8)
    with _start_deadline(start_timeout, index, count):
        received = np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)
    token, address = received.tobytes().decode().split()
    return ProcessGroup(
        index=index,
        count=count,
        stream=coordinator.stream if coordinator else _connect(address, start_timeout),
        coordinator=coordinator,
        token=token,
        step_timeout=step_timeout,
    )


def _listen(host: str) -> socket.socket:
    try:
        return listen(host)
    except OSError as error:
        problem = Problem(host, f"process 0 cannot listen at this address of it: {error}")
        fix = f"{HOST}=ADDRESS in the environment of process 0, an address that the others reach"
        headline = "Processes do not reach each other."
        raise ProcessError(format_problems(headline, [problem], fix)) from error


def _connect(address: str, timeout: float) -> MessageStream:
    try:
        return connect(address, timeout)
    except OSError as error:
        problem = Problem(address, f"process 0 does not answer there: {error}")
        fix = f"{HOST}=ADDRESS in the environment of process 0, an address that the others reach"
        headline = "Processes do not reach each other."
        raise ProcessError(format_problems(headline, [problem], fix)) from error


def _initialize(processes: str, **arguments: object) -> None:
    try:
        jax.distributed.initialize(**arguments)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        problem = Problem("jax.distributed.initialize", first_line(error))
        fix = "sk.distributed() before the first array, key or jax.devices()"
        headline = f"The processes {processes} cannot be joined."
        raise ProcessError(format_problems(headline, [problem], fix)) from error
