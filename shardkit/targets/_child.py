"""The parent's side: starts a child with its own environment, waits, and brings the report home.

Neither libtpu nor the CUDA plugin ever enters the caller's process, and the number of simulated
devices is the child's own. The child is its own process group, so that nothing of it is left
behind after a timeout or Ctrl-C. Where the caller is killed, the child ends itself.
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
from .._core.errors import ConfigError, Problem, StepError, format_problems
from .._core.startup import quiet_libtpu
from ..hardware import Chip, find_chip
from ..mesh import Target
from ..report import Report
from ._source import Source


class NotCompiled(StepError):
    """A compiler did not finish in time, or crashed; nothing is said of the declaration."""


class OwnFailure(ConfigError):
    """The code that declares a step raised an error; the message holds its traceback.

    Attributes:
      raised: type and text of the error itself.
    """

    def __init__(self, message: str, raised: str) -> None:
        """Keeps what was raised beside the message."""
        super().__init__(message)
        self.raised = raised


# One line about every so often, for whoever waits minutes for a compiler.
_POLL = 0.2


def compile_for(
    source: Source,
    target: str,
    *,
    chip: str | Chip | None = None,
    timeout: float = 1800.0,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Compiles a declared step for a target and returns its report.

    Args:
      source: the config file or function that declares the step.
      target: `cpu:512`, `tpu:v5p:4x4x4`, `gpu:h100:1x8`, …; nothing of it need be here.
      chip: of the hardware table, by name, or another, whose figures the time is modelled with; by
        default the target's own, and no time for CPU devices.
      timeout: seconds after which the child is ended.
      progress: called several times a second with the seconds gone.

    Returns:
      The report of the compiled step. Its figures are compiled, not measured.

    Raises:
      MeshError: the target is unknown, or its compiler is not installed.
      ReportError: there is no such chip.
      OwnFailure: the code that declares the step raised another error; a `ConfigError`.
      ShardkitError: whatever is wrong with the declaration, as if it were compiled here.
      NotCompiled: the child did not finish in time, or its compiler crashed; a `StepError`.
    """
    wanted = Target.parse(target)
    figures = find_chip(chip) if isinstance(chip, str) else chip
    asked = {
        "source": source.to_request(),
        "target": str(wanted),
        "chip": figures and dataclasses.asdict(figures),
    }
    with tempfile.TemporaryDirectory(prefix="shardkit-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(asked))
        with Path(folder, "stderr").open("w+b") as log:
            command = [sys.executable, "-m", "shardkit.targets", str(request), str(answer)]
            child = subprocess.Popen(
                command,
                env=_environment(),
                # Nothing is ever written: that it closes tells the child that nobody waits for it.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            with _ended(child):
                _wait(child, wanted, timeout, progress or (lambda seconds: None))
            log.seek(0)
            said = log.read().decode(errors="replace")
        if not answer.exists():
            _crashed(child, wanted, said)
        return _opened(json.loads(answer.read_text()))


def _environment() -> dict[str, str]:
    """The caller's environment, with which only the CPU backend is ever started."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    own = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        # libtpu asks the cloud what machine this is, and locks itself to one process.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Ahead-of-time entries of the persistent cache cannot be read back.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**inherited, **quiet_libtpu(os.environ), **own}


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
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
            child.wait(_POLL)


def _crashed(child: subprocess.Popen[bytes], target: Target, said: str) -> None:
    code = child.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    tail = "\n".join(said.strip().splitlines()[-12:])
    if not tail:
        fix = "no sys.exit or os._exit in what declares the step"
        _refuse(target, f"the compiling process {how} and said nothing", fix)
    _refuse(target, f"the compiling process {how}; its last lines:\n{tail}", "see above")


def _opened(answer: dict[str, Any]) -> Report:
    """The report, or the child's error raised here as what it was."""
    if "report" in answer:
        return Report.from_json(answer["report"])
    if "raised" in answer:
        raise OwnFailure(answer["message"], answer["raised"])
    kind = getattr(_errors, answer["kind"], None)
    if kind is None:
        text = f"{answer['kind']}: {answer['message']}"
        raise RuntimeError(f"The compiling process failed.\n{answer['trace']}\n{text}")
    raise kind(answer["message"])


def _refuse(target: Target, why: str, fix: str) -> None:
    problem = Problem(str(target), why)
    raise NotCompiled(format_problems("The step was not compiled.", [problem], fix))
