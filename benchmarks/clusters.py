"""`shardkit train` on a SLURM, under Open MPI and in Ray actors, killed and resumed.

    python benchmarks/clusters.py [slurm] [mpi] [ray] [--steps 120]

Each engine starts the file that docs/run/clusters.md shows, with two processes of four simulated
devices, on this machine and its loopback interface only. A run is stopped once it has made a third
of its updates, started again as the page says, and compared with one process of eight devices: the
loss of every update and every parameter at the end.

SLURM (Debian: `apt-get install slurm-wlm munge`) is set up in a temporary folder: its slurm.conf, a
key, `munged`, `slurmctld` and `slurmd`, which end with this script. Open MPI is `openmpi-bin`; Ray
is `pip install ray`. The script runs as root: it starts itself again in a network namespace that
has nothing but a loopback interface, and slurmd starts jobs for others.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import _harness
import numpy as np
from _run_folder import read_metrics, saved_leaves

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "run" / "clusters.md"
CONFIG = """
import dataclasses
import shardkit as sk
from shardkit.config import load_config

def config() -> sk.Config:
    base = load_config("nano")
    model = dataclasses.replace(base.model, num_layers=1, embed_dim=32, mlp_dim=32)
    data = dataclasses.replace(base.data, seq_len=16)
    train = dataclasses.replace(
        base.train, steps={steps}, checkpoint_every=10, sample=0, baselines=False, check="off",
    )
    return dataclasses.replace(base, name="clusters", model=model, data=data, train=train)
"""
DEADLINE = 1200  # seconds for each wait; a busy machine compiles for minutes
LOOPBACK = "127.0.0.1"
ISOLATED = "SHARDKIT_BENCHMARK_ISOLATED"


@dataclasses.dataclass(frozen=True)
class Site:
    """A folder with a config and `.venv/bin/shardkit`, as the page has it.

    Attributes:
      folder: where the command is started.
      devices: simulated devices of each process.
    """

    folder: pathlib.Path
    devices: int

    def make(self, steps: int) -> "Site":
        """Creates the folder."""
        command = self.folder / ".venv" / "bin" / "shardkit"
        command.parent.mkdir(parents=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m shardkit.cli "$@"\n')
        command.chmod(0o755)
        (self.folder / "my_config.py").write_text(CONFIG.format(steps=steps))
        return self

    @property
    def environment(self) -> dict[str, str]:
        """Of the command."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self.devices),
            "SHARDKIT_COORDINATOR_HOST": LOOPBACK,
            "OMPI_MCA_oob_tcp_if_include": "lo",  # it takes no loopback by itself
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, words: list[str], **more: str) -> subprocess.Popen[str]:
        """Starts a command there; what it prints is appended to `log`."""
        environment = self.environment | more
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=log, stderr=log, text=True
            )

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Whole lines of the metrics."""
        return [row for row in read_metrics(self.run_folder) if row["kind"] == kind]

    @property
    def run_folder(self) -> pathlib.Path:
        """Where the run keeps its files."""
        return self.folder / "runs" / "clusters"

    @property
    def step(self) -> int:
        """The newest update."""
        return max((row["step"] for row in self.rows("step")), default=0)

    def wait(self, what: str, ready: Any, run: subprocess.Popen[str] | None = None) -> None:
        """Waits until something holds, and shows the log if it does not, or the command ends."""
        until = time.monotonic() + DEADLINE
        while not ready():
            if time.monotonic() > until or (run is not None and run.poll()):
                raise TimeoutError(f"{what}\n{(self.folder / 'log').read_text()[-4000:]}")
            time.sleep(0.1)


def block(heading: str) -> str:
    """The file below a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(r"^```text\n(.*?)^```$", section, re.M | re.S)
    assert found, heading
    return found[1]


@contextlib.contextmanager
def daemons(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts a SLURM of one node in a folder; yields the environment of its commands."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key, pipe = folder / "key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for i in range(8):  # what the page's script asks for; nothing opens them
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    settings = {
        "ClusterName": "one",
        "SlurmctldHost": f"localhost({LOOPBACK})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={pipe}",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "SlurmctldPort": 16817,
        "SlurmdPort": 16818,
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    cores = os.cpu_count()
    lines += [
        f"NodeName=localhost NodeAddr={LOOPBACK} CPUs={cores} Gres=gpu:8 State=UNKNOWN",
        "PartitionName=all Nodes=localhost Default=YES MaxTime=60 OverSubscribe=NO State=UP",
    ]
    conf = folder / "slurm.conf"
    conf.write_text("\n".join(lines) + "\n")
    names = ("munge.pid", "munge.log", "munge.seed")
    pid, log, seed = (folder / name for name in names)
    munged = ["/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={pipe}", f"--pid-file={pid}", f"--log-file={log}", f"--seed-file={seed}"]
    commands = (
        munged,
        ["/usr/sbin/slurmctld", "-D", "-i", "-f", str(conf)],
        ["/usr/sbin/slurmd", "-D", "-N", "localhost", "-f", str(conf)],
    )
    environment = {"SLURM_CONF": str(conf)}
    with contextlib.ExitStack() as stack, (folder / "daemons.log").open("w") as output:
        for command in commands:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            stack.callback(_end, process)
            time.sleep(1)
        yield environment


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def slurm(site: Site, stop_at: int) -> dict[str, Any]:
    """Submits the page's script for one node with two tasks; `scontrol requeue` stops it."""
    (site.folder / "train.sh").write_text(block("SLURM"))
    with daemons(site.folder / "slurm") as environment:

        def ask(*words: str) -> str:
            run = subprocess.run(
                words, env={**site.environment, **environment}, capture_output=True, text=True
            )
            return run.stdout + run.stderr

        site.wait("an idle node", lambda: "idle" in ask("sinfo", "-h", "-o", "%t"))
        # What differs from the file on this machine: one node, two tasks.
        words = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "train.sh"]
        submitted = site.start(words, **environment)
        submitted.wait()
        job = (site.folder / "log").read_text().split()[-1]
        site.wait("a third of the updates", lambda: site.step >= stop_at)
        stopped = time.monotonic()
        answer = ask("scontrol", "requeue", job)
        assert not answer, answer
        site.wait("resumed", lambda: site.rows("resumed"))
        again = time.monotonic() - stopped
        site.wait("the end", lambda: site.rows("result"))
        site.wait("an empty queue", lambda: not ask("squeue", "-h"))
        shown = ask("scontrol", "show", "job", job)
        version = ask("sinfo", "--version").strip()
    assert re.search(r"Restarts=1\b", shown), shown
    assert re.search(r"ExitCode=0:0", shown), shown
    return {"engine": version, "stopped by": "scontrol requeue", "resumed after s": f"{again:.0f}"}


def mpi(site: Site, stop_at: int) -> dict[str, Any]:
    """Runs the page's command with two processes; one of them is killed by SIGKILL."""
    text = block("Open MPI").replace("-n 16 --host node1:8,node2:8", "-n 2 --host localhost:2")
    words = ["sh", "-c", f"exec {text}"]
    run = site.start(words)
    site.wait("a third of the updates", lambda: site.step >= stop_at, run)
    stopped = time.monotonic()
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    assert run.wait(60) != 0
    ended = time.monotonic() - stopped
    assert site.start(words).wait(DEADLINE) == 0
    assert site.rows("resumed")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    print(f"all ended {ended:.1f} s after the kill")
    return {"engine": version.splitlines()[0], "stopped by": "SIGKILL of process 1"}


def ray(site: Site, stop_at: int) -> dict[str, Any]:
    """Runs the page's program; one actor's process is killed, and the program starts two others."""
    import ray as library  # pyright: ignore[reportMissingImports]

    (site.folder / "ray_train.py").write_text(block("Ray"))
    words = [sys.executable, "ray_train.py", "my_config.py", "--set", "devices=local"]
    run = site.start(words)
    site.wait("a third of the updates", lambda: site.step >= stop_at, run)
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
    actors = [line.split()[0] for line in listed.splitlines() if "ray::Worker.train" in line]
    assert len(actors) == 2, listed
    stopped = time.monotonic()
    os.kill(int(actors[1]), signal.SIGKILL)
    site.wait("resumed", lambda: site.rows("resumed"))
    again = time.monotonic() - stopped
    assert run.wait(DEADLINE) == 0
    return {
        "engine": f"Ray {library.__version__}",
        "stopped by": "SIGKILL of an actor",
        "resumed after s": f"{again:.0f}",
    }


def compare(site: Site, alone: Site, steps: int) -> dict[str, str]:
    """Largest relative differences of the losses and of a parameter from those of one process."""
    losses, reference = (
        np.array([row["loss"] for row in one.rows("step")]) for one in (site, alone)
    )
    assert [row["step"] for row in site.rows("step")] == list(range(1, steps + 1))
    got, want = (saved_leaves(one.run_folder, steps, "params") for one in (site, alone))
    assert got.keys() == want.keys()
    params = max(
        float(np.linalg.norm(got[path] - x) / max(np.linalg.norm(x), 1e-30))
        for path, x in want.items()
    )
    loss = float(np.max(np.abs(losses - reference) / np.abs(reference)))
    assert loss < 1e-4, loss
    return {"losses within": f"{loss:.1e}", "parameters within": f"{params:.1e}"}


ENGINES = {"slurm": slurm, "mpi": mpi, "ray": ray}


def isolate() -> None:
    """Starts this script again where no other machine reaches what it starts."""
    if not os.environ.get(ISOLATED):
        # Names are not resolved where 127.0.0.1 is the only address.
        loopback = "ip link set lo up && ip address add 127.0.0.2/8 dev lo"
        words = ["unshare", "--net", "sh", "-c", f'{loopback} && exec "$@"', "sh"]
        os.environ[ISOLATED] = "1"
        os.execvp(words[0], [*words, sys.executable, *sys.argv])


def main() -> None:
    """Runs the engines one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", choices=[[], *ENGINES], default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--keep", type=pathlib.Path, help="folder for what the runs write")
    arguments = parser.parse_args()
    isolate()
    # By SIGTERM the daemons end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = []
    with contextlib.ExitStack() as stack:
        work = arguments.keep or pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="shardkit-clusters-"))
        )
        alone = Site(work / "alone", 8)
        if not alone.rows("result"):
            alone.make(arguments.steps)
            words = [".venv/bin/shardkit", "train", "my_config.py", "--set", "devices=local"]
            assert alone.start(words).wait(DEADLINE) == 0, (alone.folder / "log").read_text()
        for name in arguments.engines:
            site = Site(work / name, 4).make(arguments.steps)
            row = ENGINES[name](site, arguments.steps // 3)
            (resumed,) = site.rows("resumed")
            row |= {"resumed at": resumed["step"], "updates": arguments.steps}
            rows.append({**row, **compare(site, alone, arguments.steps)})
    measured = {row["engine"] for row in rows}
    rows = [row for row in _harness.read_rows("clusters") if row["engine"] not in measured] + rows
    note = (
        "Two processes of four simulated devices on one machine and its loopback interface, "
        "started from the files of docs/run/clusters.md with this machine's numbers of nodes and "
        "processes, against one process of eight devices: largest relative difference of a loss "
        "and of a parameter after the last update. The metrics hold every update once. "
        "Engines are run apart; the circumstances are those of the last one. Of the seconds until "
        "a run resumed most are compiling, in two processes on a busy machine."
    )
    _harness.write("clusters", "measured", "2 x 4 simulated CPU devices", rows, note)


if __name__ == "__main__":
    main()
