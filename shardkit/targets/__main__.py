"""The child process: loads a step, compiles it for its target, writes the report."""

import json
import os
import shutil
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._core.errors import ShardkitError
from .._core.io._files import write_atomic
from ..hardware import Chip
from ..mesh import MeshSpec, Target, settle_devices
from ..report import Report
from ..step import CompiledStep, StepSpec
from ._devices import build_target_mesh
from ._source import StepSource


def compile_report(source: StepSource, target: Target, chip: str | Chip | None = None) -> Report:
    """Compiles a source for a target in this process; a chip gives the modelled time."""
    settle_devices(target.n_devices if target.kind == "cpu" else None)
    return compile_for_devices(*source.load_with_mesh(), target).report(chip=chip)


def compile_for_devices(spec: StepSpec, mesh: MeshSpec, target: Target) -> CompiledStep:
    """Compiles a spec for the devices of a target."""
    return spec.compile(build_target_mesh(mesh, target))


def end_with_parent(folder: Path) -> None:
    """Kills this process and its children, and removes its folder, once the parent has ended."""
    parent = os.dup(0)
    # The pipe on stdin is the parent's; the user's code reads an empty stdin.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def watch() -> None:
        os.read(parent, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def find_user_line(error: BaseException) -> str | None:
    """`FILE:LINE` at which a user's code raised an error; None if shardkit raised it.

    The innermost frame outside of libraries decides; shardkit does not count as a library.
    """
    package = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if package in path.parents:
            return None
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        standard = Path(sysconfig.get_path("stdlib")) in path.parents
        if path.exists() and not installed and not standard:
            return f"{frame.filename}:{frame.lineno}"
    return None


def _format_user_error(source: Mapping[str, Any], trace: str, line: str) -> str:
    name = source["name"] or "the default config"
    return f"The code of {name} raised an error.\n{trace.strip()}\nFix: {line}"


def main(request: str, answer: str) -> None:
    """Reads a request and writes an answer: a report, or the error."""
    fields = json.loads(Path(request).read_text())
    try:
        source, target = StepSource.from_request(fields["source"]), Target.parse(fields["target"])
        chip = Chip(**fields["chip"]) if fields["chip"] else None
        reply: dict[str, Any] = {"report": compile_report(source, target, chip).to_json()}
    except ShardkitError as error:
        reply = {"kind": type(error).__name__, "message": str(error)}
    except Exception as error:
        trace = traceback.format_exc()
        reply = {"kind": type(error).__qualname__, "message": str(error), "trace": trace}
        if (line := find_user_line(error)) is not None:
            message = _format_user_error(fields["source"], trace, line)
            reply = {"message": message, "raised": f"{type(error).__name__}: {error}"}
    with write_atomic(Path(answer)) as part:
        part.write_text(json.dumps(reply), "utf-8")


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]).parent)
    main(*sys.argv[1:])
