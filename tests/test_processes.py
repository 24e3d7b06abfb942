"""Several processes without JAX: who belongs together, who is missing, and what is said of it."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.processes import _launch, launch
from shardkit.processes._cluster import (
    check_environment,
    check_port,
    coordinator_address,
    detected_cluster,
    host_of_process,
    initialize_arguments,
    process_count,
    process_of_cluster,
)
from shardkit.processes._coordinator import Coordinator
from shardkit.processes._membership import membership
from shardkit.processes._message_stream import Closed, MessageStream, address_of, connect, listen
from shardkit.processes._roll_call import RollCall

# --- where several processes come from


@pytest.mark.parametrize(
    ("signs", "cluster"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": "2",
            },
            "SLURM",
        ),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_clusters_are_known_by_their_signs(signs, cluster):
    assert detected_cluster(signs) == cluster
    told = {"SLURM": 2, "Open MPI": None, "Cloud TPU": None, None: 1}
    assert process_count(signs) == told.get(cluster)
    assert membership(signs) is None


BY_HAND = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
NEW_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("signs", "told", "fix"),
    [
        # What JAX would ignore, so that each process trains alone, or abort on.
        (
            {"JAX_NUM_PROCESSES": "4"},
            "JAX_NUM_PROCESSES=4  needs JAX_PROCESS_ID",
            "JAX_PROCESS_ID=0",
        ),
        (
            {**BY_HAND, "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID=4  must be less than",
            "JAX_PROCESS_ID=0",
        ),
        ({**BY_HAND, "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x  is not a whole number", "=1"),
        ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": "h"}, "=h  is not the HOST:PORT", "localhost:8476"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "h:1  needs JAX_NUM_PROCESSES and", "or none of them"),
        (NEW_MPI, "OMPI_COMM_WORLD_SIZE=4  is from an Open MPI that", "mpirun -x JAX_COORDINATOR"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "=a,b  needs TPU_WORKER_ID", "TPU_WORKER_ID=0"),
        (
            {"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"},
            "kubernetes, which is not installed",
            "pip install 'jax[k8s]'",
        ),
    ],
)
def test_half_a_cluster_in_the_environment_is_refused(signs, told, fix):
    with pytest.raises(sk.errors.ProcessError) as error:
        check_environment(signs)
    head, _, fixes = str(error.value).partition("Fix:")
    assert told in head
    assert fix in fixes


ROOT = Path(__file__).parent.parent


def test_a_port_that_is_taken_is_told_in_process_0():
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        signs = {**BY_HAND, "JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "0"}
        with pytest.raises(sk.errors.ProcessError, match=f"={address} .*cannot listen") as error:
            check_port(signs)
        assert "Fix: another port in JAX_COORDINATOR_ADDRESS" in str(error.value)
        check_port({**signs, "JAX_PROCESS_ID": "1"})
    check_port(signs)


def test_a_whole_cluster_in_the_environment_is_taken():
    address = {"JAX_COORDINATOR_ADDRESS": "h:1"}
    slurm = {f"SLURM_{name}": "2" for name in ("JOB_ID", "STEP_NODELIST", "LOCALID", "NTASKS")}
    slurm |= {"SLURM_PROCID": "1"}
    old_mpi = {**NEW_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}
    # (environment, processes, what JAX is told)
    by_hand = {"num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"}
    for signs, count, arguments in (
        ({}, 1, {}),
        (BY_HAND, 4, by_hand),
        (slurm, 2, {}),
        ({**slurm, **address}, 2, {}),
        ({**slurm, **BY_HAND}, 4, by_hand),
        (old_mpi, 4, {}),
        ({**slurm, **old_mpi}, 4, {}),
        ({**NEW_MPI, **address}, 4, {**by_hand, "local_device_ids": [1]}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, 2, {}),
        ({"MEGASCALE_NUM_SLICES": "2"}, None, {}),
    ):
        check_environment(signs)
        assert process_count(signs) == count, signs
        assert initialize_arguments(signs) == arguments, signs
    assert process_of_cluster({**slurm, **old_mpi}) == (3, 4)


def test_a_job_of_several_tasks_without_srun_is_warned_of(monkeypatch):
    # In a batch script these are set, and SLURM_STEP_NODELIST is not.
    job = {"JOB_ID": "7", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.warns(RuntimeWarning, match="job 7 has 2 tasks, and this process runs alone"):
        assert sk.distributed().count == 1


def test_a_process_alone_agrees_with_itself():
    with sk.distributed() as process_group:
        process_group.report_step(1)
        process_group.agree("settings", seed=0)
        assert (process_group.index, process_group.count, process_group.gather("x", 7)) == (
            0,
            1,
            [7],
        )


HANDLES = """
import threading, time
import shardkit as sk
for attempt in range(3):
    try:
        with sk.distributed(step_timeout=0.2) as process_group:
            process_group.report_step(attempt)
            raise [OSError("gone"), KeyboardInterrupt(), sk.ShardkitError("no")][attempt]
    except BaseException as error:
        print(type(error).__name__, process_group.failure)
time.sleep(1)
print("alive", [t.name for t in threading.enumerate() if t.name.startswith("shardkit")])
"""


def test_an_exception_that_is_handled_ends_nothing():
    ended = subprocess.run([sys.executable, "-c", HANDLES], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    names = ["OSError None", "KeyboardInterrupt None", "ShardkitError None", "alive []"]
    assert ended.stdout.splitlines() == names


# --- the coordinator


@pytest.fixture
def joined():
    """A coordinator of three, and the streams of its members."""
    listener = listen("127.0.0.1")
    coordinator = Coordinator(listener, 3, "token", patience=0.5)
    streams = [coordinator.stream, *(connect(address_of(listener), 5) for _ in range(2))]
    for process, stream in enumerate(streams):
        stream._socket.settimeout(30)  # not for long, but machines are busy
        stream.present("token")
        stream.send("hello", process=process)
    yield coordinator, streams
    for stream in streams:
        stream.send("bye")
    coordinator.close()
    for stream in streams:
        stream.close()


def heard(stream, kind):
    """The next message of a kind."""
    while True:
        for message in stream.receive():
            if message["kind"] == kind:
                return message


def test_values_are_gathered_from_all(joined):
    _, streams = joined
    for process in (2, 0, 1):
        streams[process].send("gather", topic="t", value=process * 10, patient=False)
    assert [heard(stream, "gathered")["values"] for stream in streams] == [[0, 10, 20]] * 3


def test_a_lost_connection_is_told_to_all_the_others_at_once(joined):
    _, streams = joined
    streams[1].send("at", step=7, events=9)
    streams[1].close()
    began = time.monotonic()
    for stream in (streams[0], streams[2]):
        end = heard(stream, "end")
        assert (end["process"], end["step"]) == (1, 7)
        assert end["cause"] == "killed, or cut off: its connection has closed"
    assert time.monotonic() - began < 0.5


def test_the_first_failure_is_the_one_that_is_told(joined):
    _, streams = joined
    streams[2].send("failed", step=3, cause="ValueError: boom")
    assert heard(streams[0], "end")["cause"] == "ValueError: boom"
    streams[1].close()
    streams[0]._socket.settimeout(0.4)
    with pytest.raises(Closed) as nothing:
        heard(streams[0], "end")
    assert isinstance(nothing.value.__cause__, TimeoutError)


def test_who_is_behind_is_who_hangs(joined):
    _, streams = joined
    for process, events in enumerate((8, 6, 9)):
        streams[process].send("at", step=events // 2, events=events)
    streams[0].send("stalled", seconds=2.5)
    end = heard(streams[2], "end")
    assert (end["process"], end["step"], end["stuck"]) == (1, 3, True)
    assert end["cause"] == "stuck: no progress for 2.5 s, the declared step timeout"


def test_where_nobody_is_behind_that_is_said(joined):
    _, streams = joined
    for stream in streams:
        stream.send("at", step=4, events=8)
    streams[1].send("stalled", seconds=2.5)
    assert heard(streams[0], "end")["cause"].endswith("; no process is ahead of the others")


def test_a_process_that_does_not_come_is_named(joined):
    _, streams = joined
    for process in (0, 1):
        streams[process].send("gather", topic="settings", value=0, patient=False)
    end = heard(streams[0], "end")
    assert end["process"] == 2
    assert end["cause"] == "has not reached 'settings' within 0.5 s"


def test_who_comes_late_hears_of_the_end_too(joined):
    coordinator, streams = joined
    streams[1].send("failed", step=2, cause="boom")
    assert heard(streams[0], "end")["step"] == 2
    streams[2].send("bye")
    time.sleep(0.1)
    late = connect(address_of(coordinator._listener), 5)
    late.present("token")
    late.send("hello", process=2)
    assert heard(late, "end")["cause"] == "boom"
    late.send("bye")
    late.close()


def test_strangers_are_turned_away(joined):
    coordinator, streams = joined
    stranger = connect(address_of(coordinator._listener), 5)
    stranger.present("guess")
    stranger.send("hello", process=1)
    with pytest.raises(Closed):
        stranger.receive()
    stranger.close()
    rude = socket.create_connection(coordinator._listener.getsockname())
    rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert rude.recv(10) == b""
    rude.close()
    streams[1].send("failed", step=0, cause="real")
    assert heard(streams[0], "end")["cause"] == "real"


def hostile(rng):
    """Bytes that no process sends: noise, JSON of every form, half tokens, and much of it."""
    forms = [b"1\n", b"null\n", b"[" * 5000 + b"\n", b'{"kind": "bye"}\n', b"toke", b"", b"\n\n"]
    forms += [b'{"kind": "hello", "process": 1, "token": "token"}\n', b"token" * 9, b"\xff\0\n"]
    forms += [rng.randbytes(rng.randrange(1, 2000)), b"x" * 2**17]
    return rng.choice(forms)


def test_strangers_may_send_anything(joined):
    coordinator, streams = joined
    rng, rude = random.Random(0), []
    for i in range(400):
        connected = socket.create_connection(coordinator._listener.getsockname())
        rude.append(connected)
        with contextlib.suppress(OSError):
            connected.sendall(hostile(rng))
        if i % 3:
            rude.pop(rng.randrange(len(rude))).close()
    for process in range(3):
        streams[process].send("gather", topic="t", value=process, patient=False)
    assert [heard(stream, "gathered")["values"] for stream in streams] == [[0, 1, 2]] * 3
    assert len(coordinator._strangers) <= 3 + 64 + 1
    assert all(len(stream._incomplete) <= 2**16 for stream in list(coordinator._strangers))
    for connected in rude:
        connected.close()


def test_process_0_is_no_stranger_however_late_it_comes(monkeypatch):
    monkeypatch.setattr("shardkit.processes._coordinator._STRANGER_TIMEOUT", 0.1)
    listener = listen("127.0.0.1")
    coordinator = Coordinator(listener, 1, "token", patience=30)
    rude = [socket.create_connection(listener.getsockname()) for _ in range(100)]
    assert [connected.recv(1) for connected in rude] == [b""] * 100
    coordinator.stream.present("token")
    coordinator.stream.send("hello", process=0)
    coordinator.stream.send("gather", topic="t", value=7, patient=False)
    assert heard(coordinator.stream, "gathered")["values"] == [7]
    coordinator.stream.send("bye")
    coordinator.close()
    for connected in (*rude, coordinator.stream):
        connected.close()


@pytest.mark.parametrize(
    "line",
    [
        b"1",
        b'{"kind": "at", "step": "x", "events": 1}',
        b'{"kind": "at"}',
        b'{"kind": ["at"]}',
        b'{"kind": "gather", "topic": [], "value": 1, "patient": false}',
        b'{"kind": "no"}',
        b"[" * 100_000,
        b"x" * 2**18,
    ],
)
def test_a_member_that_no_longer_speaks_the_protocol_ends_all_by_name(line, joined):
    _, streams = joined
    for stream in streams:  # so that all have been admitted
        stream.send("gather", topic="t", value=0, patient=False)
    heard(streams[1], "gathered")
    streams[1]._send_line(line if len(line) < 2**17 else line * 80)
    assert heard(streams[2], "end")["process"] == 1


def test_the_pieces_of_a_long_message_are_not_copied_for_each_other():
    """16 MiB took seconds of the coordinator, and longer than a busy machine's timeouts."""
    ours, theirs = socket.socketpair()
    stream = MessageStream(theirs)
    ours.sendall(b'{"kind": "at", ')
    assert stream.receive() == []
    buffer = stream._incomplete
    ours.sendall(b'"step": 1')
    assert stream.receive() == []
    assert stream._incomplete is buffer
    ours.sendall(b'}\n{"kind": "bye"}\n{')
    assert stream.receive() == [{"kind": "at", "step": 1}, {"kind": "bye"}]
    assert stream._incomplete == b"{"
    ours.close()
    stream.close()


@pytest.mark.parametrize("process", [-1, 3, True, "1", None, 10**30])
def test_only_numbers_of_processes_are_admitted(process, joined):
    coordinator, _ = joined
    late = connect(address_of(coordinator._listener), 5)
    late.present("token")
    late.send("hello", process=process)
    with pytest.raises(Closed):
        late.receive()
    late.close()


# --- the launcher, with programs that know nothing of it

PRINTS = "import os, json; print(json.loads(os.environ['SHARDKIT_PROCESS'])['index'])"
FAILS = "import time\nif i == 1: print('bad luck', file=sys.stderr); sys.exit(3)\ntime.sleep(60)"
DIES = "import time, signal\nif i == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
DEAF = "import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAILS[12:]
# Says that it fails, and is then slow to end, as on a busy machine.
SLOW = """
import json, signal, socket, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if i == 1:
    control = socket.socket(fileno=json.loads(os.environ["SHARDKIT_PROCESS"])["control"])
    line = "process 1 of 2, before its first step: ended with code 2"
    end = {"kind": "end", "process": 1, "line": line, "own": True, "code": 2}
    control.sendall(json.dumps(end).encode() + b"\\n")
time.sleep(60)
"""
INDEX = "import os, sys, json; i = json.loads(os.environ['SHARDKIT_PROCESS'])['index']\n"


def launched(program, capfd, n=2):
    began = time.monotonic()
    code = launch([sys.executable, "-c", INDEX + program], n)
    out = capfd.readouterr()
    return code, out.out, out.err.splitlines(), time.monotonic() - began


def test_output_is_kept_apart(capfd):
    code, out, err, _ = launched("print(i); print('e', i, file=sys.stderr)", capfd, 3)
    assert code == 0
    assert sorted(out.splitlines()) == ["0", "[1] 1", "[2] 2"]
    assert sorted(err) == ["[0] e 0", "[1] e 1", "[2] e 2"]


@pytest.mark.parametrize(
    ("program", "expected", "how"),
    [
        (FAILS, 3, "ended with code 3"),
        (DIES, 128 + signal.SIGKILL, "killed by SIGKILL"),
        (DEAF, 3, "ended with code 3"),
        (SLOW, 2, "ended with code 2"),
    ],
)
def test_the_first_failure_ends_all(program, expected, how, capfd):
    code, _, err, seconds = launched(program, capfd)
    assert code == expected
    assert err[0] == f"process 1 of 2, before its first step: {how}"
    assert seconds < 2.5


def test_what_cannot_be_started_is_said(capsys):
    assert main(["launch", "-n", "0", "--devices", "0", "--"]) == 2
    err = capsys.readouterr().err
    assert "-n 0         must be at least 1" in err
    assert "--devices 0  must be at least 1" in err
    assert "shardkit launch -n 2 -- shardkit train CONFIG" in err
    with pytest.raises(
        sk.errors.ProcessError, match=r"nosuchword  is not a command on this machine"
    ):
        launch(["nosuchword"], 2)


def test_ctrl_c_asks_all_to_end_in_order_and_again_ends_them():
    program = INDEX + (
        "import signal, time\n"
        "say = lambda word: os.write(1, word)  # One write each: both children share the pipe.\n"
        "signal.signal(signal.SIGTERM, lambda *a: say(b'asked\\n'))\n"
        "say(b'up\\n')\n"
        "time.sleep(30)\ntime.sleep(30)"
    )
    words = ["-m", "shardkit", "launch", "-n", "2", "--", sys.executable, "-c", program]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert sorted(run.stdout.readline() for _ in range(2)) == ["[1] up\n", "up\n"]
            run.send_signal(signal.SIGINT)
            assert sorted(run.stdout.readline() for _ in range(2)) == ["[1] asked\n", "asked\n"]
            run.send_signal(signal.SIGINT)
            assert run.wait(5) == 128 + signal.SIGKILL
        finally:
            run.kill()


HEARS_LATE = """
import sys, time
from shardkit._core.interrupts import InterruptGuard
from shardkit.processes import launch

class Late(InterruptGuard):
    def _exit_unless_raised(self, number):
        time.sleep(0.5)
        super()._exit_unless_raised(number)

# After a second the launcher supervises.
child = "import os, time; time.sleep(1); os.kill(os.getppid(), 2); time.sleep(30)"
with Late():
    code = launch([sys.executable, "-c", child], 1)
    time.sleep(1.5)
    print(f"the child ended with {code}")
"""


def test_ctrl_c_that_the_launcher_has_handled_is_no_news_to_a_thread_that_hears_it_late():
    run = subprocess.run(
        [sys.executable, "-c", HEARS_LATE], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "the child ended with 130\n", run.stderr


def test_ctrl_c_while_processes_start_leaves_none_behind(monkeypatch, tmp_path):
    """The window is short: here it is when the last one has started, and nothing watches yet."""

    def interrupted(children):
        raise KeyboardInterrupt

    monkeypatch.setattr(_launch, "_killed_with_launcher", interrupted)
    started = []
    monkeypatch.setattr(
        _launch,
        "_popen",
        lambda *args, popen=_launch._popen: started.append(popen(*args)) or started[-1],
    )
    with pytest.raises(KeyboardInterrupt):
        launch([sys.executable, "-c", "import time; time.sleep(60)"], 2)
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


STARTS = """
import ctypes, os, sys
mutex, libc = (ctypes.c_byte * 64)(), ctypes.CDLL(None)

def wait_for_ever():  # as for a compiler
    libc.pthread_mutex_lock(mutex)
    os.write(1, b"up\\n")
    libc.pthread_mutex_lock(mutex)

if sys.argv[1] == "imports":
    wait_for_ever()
import shardkit as sk
with sk.distributed() as process_group:
    process_group.begin()
    if sys.argv[1] == "trains":
        process_group.begin(0)
        process_group.report_step(1)
    wait_for_ever()
"""


@pytest.mark.parametrize("what", ["imports", "compiles", "trains"])
def test_ctrl_c_ends_processes_at_once_that_have_nothing_to_save(what):
    words = ["-m", "shardkit", "launch", "-n", "2", "--", sys.executable, "-c", STARTS, what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *words], **pipes, cwd=ROOT) as run:
        try:
            out = run.stdout
            assert out is not None
            assert sorted(out.readline() for _ in range(2)) == ["[1] up\n", "up\n"]
            run.send_signal(signal.SIGINT)
            if what == "trains":
                with pytest.raises(subprocess.TimeoutExpired):
                    run.wait(2)
                run.send_signal(signal.SIGINT)  # now also what is not saved
            _, errors = run.communicate(timeout=10)
        finally:
            run.kill()
    if what == "trains":
        assert run.returncode == 128 + signal.SIGKILL
    else:
        assert (run.returncode, errors.splitlines()[0]) == (130, "Interrupted.")
        assert "killed" not in errors


WAITS_FOR_EVER = """
import ctypes, threading
from shardkit.run._stop import StopRequest
mutex, libc = (ctypes.c_byte * 64)(), ctypes.CDLL(None)
with StopRequest():
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.3, print, ("waits",), {"flush": True}).start()
    libc.pthread_mutex_lock(mutex)  # no signal interrupts it, as none interrupts a device
"""


def test_a_second_ctrl_c_ends_a_process_that_never_comes_back_to_python():
    run = subprocess.Popen([sys.executable, "-c", WAITS_FOR_EVER], stdout=subprocess.PIPE)
    with run:
        assert run.stdout.readline() == b"waits\n"
        run.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.3)
        run.send_signal(signal.SIGINT)
        # A machine that is busy may give Python the time to read the first one: then the system's
        # own handler stands for the second.
        assert run.wait(10) in (130, -signal.SIGINT)


COMPILES = """
import ctypes, sys, threading
from shardkit.cli import _main as entry
from shardkit.cli._command import Command
mutex, libc = (ctypes.c_byte * 64)(), ctypes.CDLL(None)

def compile_for_ever(arguments):
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.3, print, ("compiles",), {"flush": True}).start()
    libc.pthread_mutex_lock(mutex)

def fail_to_import(arguments):
    try:
        print("compiles", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        raise ImportError("cannot import name 'x'") from None

run = {"compile": compile_for_ever, "import": fail_to_import}[sys.argv.pop()]
entry.COMMANDS = (Command("plan", "waits", run),)
sys.exit(entry.main())
"""


# A job in the background of a shell starts with Ctrl-C ignored.
TRAINS = """
import ctypes, signal, sys, threading
import jax.numpy as jnp, optax
import shardkit as sk
signal.signal(signal.SIGINT, signal.default_int_handler)
mutex, libc = (ctypes.c_byte * 64)(), ctypes.CDLL(None)

def wait_for_ever(*_):
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.3, print, ("waits",), {"flush": True}).start()
    libc.pthread_mutex_lock(mutex)

def compiled():
    return sk.compile_step(
        lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2), optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones((4, 4))}, batch={"x": jnp.ones((8, 4))},
        mesh=sk.MeshSpec(data=1).build("cpu:1"),
        strategy=sk.strategies.data(),
    )

config = sk.TrainConfig(steps=2, eval_every=2, check="off")
step, evaluate = {"compile": (wait_for_ever, None), "evaluate": (compiled, wait_for_ever)}[
    sys.argv.pop()
]
sk.Trainer(step, lambda i: {"x": jnp.ones((8, 4))}, "run", config, evaluate=evaluate).run()
"""


@pytest.mark.parametrize("what", ["compile", "evaluate"])
def test_ctrl_c_ends_a_script_of_a_users_own_that_waits_in_c(what, tmp_path):
    words = [sys.executable, "-c", TRAINS, what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment["JAX_PLATFORMS"] = "cpu"
    with subprocess.Popen(words, **pipes, cwd=tmp_path, env=environment) as run:
        try:
            assert run.stdout is not None
            assert "waits\n" in iter(run.stdout.readline, "")  # behind the line of progress
            run.send_signal(signal.SIGINT)
            _, errors = run.communicate(timeout=20)
        finally:
            run.kill()
    said = "Step 2 is saved. Rerun the same command to resume.\n" if what == "evaluate" else ""
    assert (run.returncode, errors) == (130, f"Interrupted.\n{said}")
    steps = sk.Checkpointer(tmp_path / "run" / "checkpoints").steps()
    assert steps == ((2,) if what == "evaluate" else ())


# A program that XLA compiles for many seconds, in threads.
COMPILES_LONG = """
import signal, sys
import jax, jax.numpy as jnp, optax
import shardkit as sk
signal.signal(signal.SIGINT, signal.default_int_handler)

def loss(params, batch, key):
    x = batch
    for w in params:
        x = jnp.tanh(x @ w) + jnp.sin(x @ w.T) * jax.nn.softmax(x)
    return jnp.mean(x**2)

compile, name = jax.stages.Lowered.compile, sys.argv.pop()
jax.stages.Lowered.compile = lambda *a, **k: print("compiles", flush=True) or compile(*a, **k)
try:
    sk.compile_step(
        loss, optax.sgd(0.1), init=lambda key: [jnp.ones((16, 16))] * 40, batch=jnp.ones((8, 16)),
        mesh=sk.MeshSpec(data=1).build("cpu:1"), strategy=sk.strategies.data(),
    )
except KeyboardInterrupt:
    if name == "left":
        raise
    print("handled", flush=True)
"""


@pytest.mark.parametrize("what", ["left", "handled"])
def test_ctrl_c_ends_a_script_that_compiles_outside_of_a_run(what):
    words = [sys.executable, "-c", COMPILES_LONG, what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen(words, **pipes, env=environment, cwd=ROOT) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "compiles\n"
            time.sleep(0.5)
            began = time.monotonic()
            run.send_signal(signal.SIGINT)
            if what == "handled":
                assert run.stdout.readline() == "handled\n"
                return
            _, errors = run.communicate(timeout=30)
        finally:
            run.kill()
    assert (run.returncode, errors.splitlines()[-1]) == (130, "KeyboardInterrupt")
    # The compiler of jax 0.12 lets no exception out before it is done, in plain JAX too.
    assert time.monotonic() - began < 3 or jax.__version_info__ >= (0, 12)


@pytest.mark.parametrize("what", ["compile", "import"])
def test_ctrl_c_ends_a_command_that_compiles_or_imports_in_one_line(what):
    words = [sys.executable, "-c", COMPILES, "plan", what]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "compiles\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=10)
    assert (run.returncode, errors) == (130, "Interrupted.\n")


SWALLOWS = """
import threading
try:
    print("imports", flush=True)
    threading.Event().wait()
except BaseException:
    pass

def run(arguments):
    return 0
"""

IMPORTS = """
import sys
import shardkit.cli._main as entry
from shardkit.cli._command import Command, import_late
entry.COMMANDS = (Command("plan", "imports", import_late("imported")),)
sys.exit(entry.main())
"""


def test_ctrl_c_is_obeyed_by_a_command_whose_imports_would_swallow_it(tmp_path):
    program = (
        "import threading\ntry:\n    print('imports', flush=True)\n    threading.Event().wait()"
    )
    program += "\nexcept BaseException:\n    pass\ndef run(arguments):\n    return 0\n"
    (tmp_path / "imported.py").write_text(program)
    words = [sys.executable, "-c", IMPORTS, "plan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(words, **pipes, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "imports\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=10)
    assert (run.returncode, errors) == (130, "Interrupted.\n")


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_children_of_any_program_end_with_a_killed_launcher():
    program = "sleep 60 & echo $$ $!; wait"
    words = ["-m", "shardkit", "launch", "-n", "2", "--", "/bin/sh", "-c", program]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = [run.stdout.readline().removeprefix("[1] ") for _ in range(2)]
        pids = [int(pid) for line in lines for pid in line.split()]
        assert all(map(alive, pids))
        run.kill()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


LATE = """
import time
if i == 1: time.sleep(60)
import shardkit as sk
with sk.distributed(start_timeout=1): pass
"""


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_a_cluster_does_not_start_is_named_without_a_stack(index):
    program = "import shardkit as sk\nwith sk.distributed(start_timeout=1): pass"
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost,gpu[07-08]", "STEP_NUM_NODES": 3, "NTASKS": 3}
    slurm |= {"PROCID": index, "LOCALID": index, "STEP_TASKS_PER_NODE": "1(x3)"}
    address = free_address()
    environment = {
        **os.environ,
        **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    (line,) = done.stderr.splitlines()
    absent, others, host = (0, "", "localhost") if index else (1, ", nor have 2", "gpu07")
    who = f"process {absent} of 3, before its first step: has not joined within 1 s{others}"
    why = f"; it has not started, or {address} is not reached. Its host is {host}"
    assert line == who + why
    assert done.returncode == 69


def test_all_processes_of_a_cluster_know_who_has_not_come():
    address = free_address()
    signs = {"JAX_COORDINATOR_ADDRESS": address}
    with contextlib.ExitStack() as stack:
        calls = {i: stack.enter_context(RollCall(i, 4, 9, signs)) for i in (0, 1, 3)}
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        stack.enter_context(stranger)
        for rude in (b"", b"7", b"-1", b"x" * 999, b"\xff2", b"0"):
            stranger.sendto(rude, ("localhost", int(address.rpartition(":")[2])))
        deadline = time.monotonic() + 30
        said = f"has not joined within 9 s; it has not started, or {address} is not reached"
        said = f"process 2 of 4, before its first step: {said}"
        while {str(call.failure()) for call in calls.values()} != {said}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stack.enter_context(RollCall(2, 4, 9, signs))
        while "has waited 9 s for all" not in "".join(str(c.failure()) for c in calls.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_coordinator_is_where_a_cluster_says():
    for signs, address in (
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "[::1]:80", "SLURM_STEP_NODELIST": "n"}, ("::1", 80)),
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.9.0.1,10.1.0.1:34911"}, "10.9.0.1"),
        ({"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,26::2]:43370"}, "fe80::b9b"),
        ({"SLURM_STEP_NODELIST": "node[001,007-015]x,host2"}, "node001x"),
        ({"SLURM_STEP_NODELIST": "][,"}, None),
    ):
        told = coordinator_address(signs)
        assert told == address or (told is not None and told[0] == address), signs
    job = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert host_of_process(1, job) == "n2"
    assert host_of_process(1, {**job, "SLURM_DISTRIBUTION": "cyclic"}) == ""
    assert host_of_process(1, {**job, "JAX_PROCESS_ID": "0"}) == ""
    assert host_of_process(1, {**job, "SLURM_STEP_TASKS_PER_NODE": "2"}) == ""


@pytest.mark.slow
def test_a_process_that_never_joins_is_named_at_the_start_timeout(capfd):
    code, _, errors, _ = launched(LATE, capfd)
    assert code not in (0, 134, 139)
    why = "process 1 of 2, before its first step: has not reached 'join' within 1 s"
    assert errors[0].endswith(why)
    assert not any("F0" in line or "***" in line for line in errors), errors


def test_half_a_message_waits_for_the_rest():
    ours, theirs = socket.socketpair()
    stream = MessageStream(ours)
    theirs.sendall(b'{"kind": "at"}\n{"kind"')
    assert stream.receive() == [{"kind": "at"}]
    theirs.sendall(b': "bye"}\n')
    assert stream.receive() == [{"kind": "bye"}]
    theirs.close()
    with pytest.raises(Closed):
        stream.receive()
    stream.close()
