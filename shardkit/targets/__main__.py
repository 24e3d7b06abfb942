"""The child's side: loads a declaration, compiles it for its target, writes the report."""

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from .._errors import ShardkitError
from ..inspect import Report
from ..mesh import Target, settle_devices
from ..step import compile_step
from ._devices import build
from ._source import Source


def report_of(source: Source, target: Target, chip: str | None = None) -> Report:
    """Compiles a source for a target in this process; its time is modelled for a chip."""
    settle_devices(target.n_devices if target.kind == "cpu" else None)
    made = source.load()
    step = compile_step(
        made.loss_fn,
        made.optimizer,
        init=made.init,
        batch=made.batch,
        mesh=build(made.mesh, target),
        strategy=made.strategy,
        mode=made.mode,
        compiler_options=made.compiler_options,
    )
    return step.report(chip=chip)


def end_with_parent(folder: Path) -> None:
    """Ends this process, all it started, and its folder, once the parent is gone."""
    parent = os.dup(0)
    # What the user's code reads is empty; the pipe is ours.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def watch() -> None:
        os.read(parent, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(request: str, answer: str) -> None:
    """Reads a request, writes an answer: a report, or what went wrong."""
    asked = json.loads(Path(request).read_text())
    try:
        source, target = Source.from_request(asked["source"]), Target.parse(asked["target"])
        made: dict[str, Any] = {"report": report_of(source, target, asked["chip"]).to_json()}
    except ShardkitError as error:
        made = {"kind": type(error).__name__, "message": str(error)}
    except Exception as error:
        trace = traceback.format_exc()
        made = {"kind": type(error).__qualname__, "message": str(error), "trace": trace}
    whole = Path(answer).with_suffix(".part")
    whole.write_text(json.dumps(made))
    whole.rename(answer)


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]).parent)
    main(*sys.argv[1:])
