"""`shardkit plan`: ranks the meshes for a config's model on a target."""

import argparse
from pathlib import Path

from .._core.errors import ConfigError, Problem, raise_all
from .._core.io._console import make_console, show_task
from .._core.io._outputs import check_figure_path, check_outputs, write_output
from ..hardware import CHIPS
from ..planner import compile_best, plan
from ..targets import StepSource


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.plot:
        check_figure_path(Path(arguments.plot), code="--plot {}")
    check_outputs({"--json": arguments.json}, "plan")
    source = StepSource(arguments.config or "", tuple(arguments.overrides))
    chips = source.config.hardware if source.config else ()
    _check_compile(arguments, source, [chip.name for chip in chips if chip.name not in CHIPS])
    rows = arguments.global_batch
    errors = make_console(stderr=True)
    with show_task(errors, f"estimating the layouts for {arguments.target}"):
        spec, _ = source.load()
        result = plan(
            spec, arguments.target, global_batch=rows, overlap=arguments.overlap, hardware=chips
        )
    if arguments.compile:
        if not errors.is_terminal:
            errors.print(f"compiling the best {arguments.compile} ...")
        with errors.status("compiling") as status:
            result = compile_best(
                result, source, arguments.compile, global_batch=rows, progress=status.update
            )
    if arguments.json:
        write_output(Path(arguments.json), result.to_json())
    if arguments.plot:
        result.plot(arguments.plot)
    make_console(soft_wrap=True).print(str(result))
    return 0


def _check_compile(arguments: argparse.Namespace, source: StepSource, own: list[str]) -> None:
    """Raises ConfigError for layouts of a function, or for chips that only the config knows."""
    named = [name for name in own if f":{name}:" in arguments.target]
    why = "must be at least 0" if arguments.compile < 0 else ""
    if arguments.compile > 0 and source.is_function:
        why = "layouts of a function are estimated, not compiled"
    elif arguments.compile > 0 and named:
        why = f"{named[0]} is the config's own chip, which no compiler knows"
    problems = [Problem(f"--compile {arguments.compile}", why, "--compile 0")] if why else []
    raise_all(ConfigError, "The layouts cannot be compiled.", problems)
