"""`distributed`: from the environment to JAX's service and a place among the others."""

import os
import secrets
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._core.errors import Problem, ProcessError, format_problems
from ._coordinator import Coordinator
from ._membership import Membership, detected_cluster, membership
from ._message_stream import MessageStream, address_of, connect, listen
from ._process_group import ProcessGroup

# Which of its addresses process 0 is to be reached at; its host name by default.
HOST = "SHARDKIT_HUB_HOST"
_ADDRESS_BYTES = 256


def distributed(*, step_timeout: float = 0.0, start_timeout: float = 300.0) -> ProcessGroup:
    """Joins the processes that run this program together, if there are others.

    Call it before JAX starts a backend. Where `shardkit launch` or a cluster (SLURM, Open MPI,
    Cloud TPU, Kubernetes) has started several processes, it calls `jax.distributed.initialize`,
    so that `jax.devices()` lists the devices of all of them, and connects each process to
    process 0. A process that dies, raises or hangs then ends all others within two seconds,
    each with one line that names it. Alone, it watches over the step timeout at most.

        with sk.distributed(step_timeout=60) as peers:
            step = sk.compile_step(...)
            peers.agree("step", program=step.program.digest, seed=seed)
            for i in range(steps):
                state, metrics = step(state, batch(i))
                peers.began(i + 1)

    Args:
      step_timeout: seconds without any event of the loop after which a process counts as stuck;
        0 for no limit.
      start_timeout: seconds that the first process waits for the last one.

    Returns:
      A context manager, whose block tells the others of any exception that leaves it.

    Raises:
      ProcessError: the others cannot be joined.
    """
    if jax.distributed.is_initialized():
        return _among_initialized(step_timeout, start_timeout)
    launched = membership()
    if launched is not None:
        return _launched(launched, step_timeout, start_timeout)
    cluster = detected_cluster()
    if cluster is not None:
        _initialize(f"of {cluster}", initialization_timeout=round(start_timeout))
        return _among_initialized(step_timeout, start_timeout)
    if not step_timeout:
        return ProcessGroup()
    return _alone(step_timeout, start_timeout)


def _alone(step_timeout: float, start_timeout: float) -> ProcessGroup:
    token = secrets.token_hex()
    hub = Coordinator(None, 1, token, start_timeout)
    return ProcessGroup(0, 1, hub.line, hub, token, step_timeout=step_timeout)


def _launched(place: Membership, step_timeout: float, start_timeout: float) -> ProcessGroup:
    hub = None
    if place.listener is not None:
        listener = socket.socket(fileno=place.listener)
        hub = Coordinator(listener, place.count, place.token, start_timeout)
    line = hub.line if hub else _connect(place.hub, start_timeout)
    launcher = MessageStream(socket.socket(fileno=place.control))
    peers = ProcessGroup(place.index, place.count, line, hub, place.token, launcher, step_timeout)
    try:
        _initialize(
            "that the launcher has started",
            coordinator_address=place.coordinator,
            num_processes=place.count,
            process_id=place.index,
            coordinator_bind_address=place.coordinator,
            initialization_timeout=round(start_timeout),
        )
    except ProcessError as error:
        peers.fail(error)
        raise
    return peers


def _among_initialized(step_timeout: float, start_timeout: float) -> ProcessGroup:
    """Process 0 tells the others where to connect, over the devices that they share already."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return _alone(step_timeout, start_timeout) if step_timeout else ProcessGroup()
    hub, told = None, ""
    if index == 0:
        listener = listen(os.environ.get(HOST, socket.gethostname()))
        token = secrets.token_hex()
        hub = Coordinator(listener, count, token, start_timeout)
        told = f"{token} {address_of(listener)}"
    words = np.frombuffer(told.ljust(_ADDRESS_BYTES).encode(), np.uint8)
    words = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint8)
    token, address = words.tobytes().decode().split()
    line = hub.line if hub else _connect(address, start_timeout)
    return ProcessGroup(index, count, line, hub, token, step_timeout=step_timeout)


def _connect(address: str, timeout: float) -> MessageStream:
    try:
        return connect(address, timeout)
    except OSError as error:
        problem = Problem(address, f"process 0 does not answer there: {error}")
        fix = f"{HOST}=ADDRESS in process 0's environment, an address that the others reach"
        headline = "Processes do not reach each other."
        raise ProcessError(format_problems(headline, [problem], fix)) from error


def _initialize(which: str, **arguments: object) -> None:
    try:
        jax.distributed.initialize(**arguments)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        problem = Problem("jax.distributed.initialize", first)
        fix = "sk.distributed() before the first array, key or jax.devices()"
        headline = f"The processes {which} cannot be joined."
        raise ProcessError(format_problems(headline, [problem], fix)) from error
