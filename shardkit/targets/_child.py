"""The parent process: starts a child with its own environment and returns its report.

Neither libtpu nor the CUDA plugin is loaded into the caller's process, and the number of simulated
devices is the child's own. The child has its own process group, which is killed as a whole after a
timeout or Ctrl-C. If the caller is killed, the child ends itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._core import errors as _errors
from .._core.errors import ConfigError, StepError
from .._core.startup import quiet_libtpu
from ..hardware import Chip, find_chip
from ..mesh import Target
from ..report import Report
from ._source import StepSource


class TargetCompileError(StepError):
    """A compiler did not finish in time, or crashed; the spec can still be valid."""


class UserCodeError(ConfigError):
    """The code that declares a step raised an error; the message holds its traceback.

    Attributes:
      raised: type and text of the error itself.
    """

    def __init__(self, message: str, raised: str) -> None:
        """Keeps the type and text of the error beside the message."""
        super().__init__(message)
        self.raised = raised


_POLL_SECONDS = 0.2


def compile_for(
    source: StepSource,
    target: str,
    *,
    chip: str | Chip | None = None,
    timeout: float = 1800.0,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Compiles a declared step for a target and returns its report.

    Args:
      source: the config file or function that declares the step.
      target: `cpu:512`, `tpu:v5p:4x4x4`, `gpu:h100:1x8`, …; its devices need not be present.
      chip: name in the hardware table, or a chip of your own, for the modelled time; by default
        the target's chip, and no time for CPU devices.
      timeout: seconds after which the child is killed.
      progress: called several times a second with the seconds so far.

    Returns:
      The report of the compiled step. Its figures are compiled, not measured.

    Raises:
      MeshError: the target is unknown, or its compiler is not installed.
      ReportError: the hardware table does not have the chip.
      UserCodeError: the code that declares the step raised another error; a `ConfigError`.
      ShardkitError: the errors of the spec, as if it were compiled in this process.
      TargetCompileError: the child did not finish in time, or its compiler crashed; a `StepError`.
    """
    devices = Target.parse(target)
    figures = find_chip(chip) if isinstance(chip, str) else chip
    fields = {
        "source": source.to_request(),
        "target": str(devices),
        "chip": figures and dataclasses.asdict(figures),
    }
    with tempfile.TemporaryDirectory(prefix="shardkit-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(fields))
        with Path(folder, "stderr").open("w+b") as log:
            command = [sys.executable, "-m", "shardkit.targets", str(request), str(answer)]
            child = subprocess.Popen(
                command,
                env=_child_environment(),
                # Nothing is written to it: it closes when the parent ends, which the child sees.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            with _kill_on_exit(child):
                _wait(child, devices, timeout, progress or (lambda seconds: None))
            log.seek(0)
            stderr = log.read().decode(errors="replace")
        if not answer.exists():
            _raise_crash(child, devices, stderr)
        return _read_answer(json.loads(answer.read_text()))


def _child_environment() -> dict[str, str]:
    """The caller's environment, changed so that only the CPU backend starts."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    own = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        # libtpu queries the cloud for its machine, and allows only one process.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Ahead-of-time entries of the persistent cache cannot be read back.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**inherited, **quiet_libtpu(os.environ), **own}


@contextlib.contextmanager
def _kill_on_exit(child: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        assert child.stdin is not None
        child.stdin.close()


def _wait(
    child: subprocess.Popen[bytes],
    target: Target,
    timeout: float,
    progress: Callable[[float], None],
) -> None:
    start = time.monotonic()
    while child.poll() is None:
        gone = time.monotonic() - start
        if gone > timeout:
            why = f"not compiled after {timeout:.0f} s"
            fix = "a longer --timeout, or fewer layers: a scanned model compiles like its layer"
            _refuse(target, why, fix)
        progress(gone)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_SECONDS)


def _raise_crash(child: subprocess.Popen[bytes], target: Target, stderr: str) -> None:
    code = child.returncode
    end = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    tail = "\n".join(stderr.strip().splitlines()[-12:])
    if not tail:
        fix = "no sys.exit or os._exit in what declares the step"
        _refuse(target, f"the compiling process {end} without a message", fix)
    _refuse(target, f"the compiling process {end}; its last lines:\n{tail}", "see above")


def _read_answer(answer: dict[str, Any]) -> Report:
    """Returns the report, or raises the child's error with its own type."""
    if "report" in answer:
        return Report.from_json(answer["report"])
    if "raised" in answer:
        raise UserCodeError(answer["message"], answer["raised"])
    kind = getattr(_errors, answer["kind"], None)
    if kind is None:
        text = f"{answer['kind']}: {answer['message']}"
        raise RuntimeError(f"The compiling process failed.\n{answer['trace']}\n{text}")
    raise kind(answer["message"])


def _refuse(target: Target, why: str, fix: str) -> None:
    raise TargetCompileError.of("The step was not compiled.", str(target), why, fix)
