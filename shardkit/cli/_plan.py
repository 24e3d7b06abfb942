"""`shardkit plan`: ranks the meshes for a config's model on a target."""

import argparse
from pathlib import Path

from .._core.errors import ConfigError, Problem, format_problems
from .._core.io._console import make_console
from .._core.io._outputs import check_figure_path, check_outputs, write_output
from ..config import load_config
from ..hardware import CHIPS, Chip
from ..planner import compile_best, plan
from ..targets import StepSource


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.plot:
        check_figure_path(Path(arguments.plot), code="--plot {}")
    check_outputs({"--json": arguments.json}, "plan")
    if arguments.compile < 0:
        problem = Problem(f"--compile {arguments.compile}", "must be at least 0", "--compile 0")
        raise ConfigError(format_problems("The layouts cannot be compiled.", [problem]))
    source = StepSource(arguments.config or "", tuple(arguments.overrides))
    if source.is_function and arguments.compile:
        why = "layouts of a function are estimated, not compiled"
        problem = Problem(f"--compile {arguments.compile}", why, "--compile 0")
        raise ConfigError(format_problems("The layouts cannot be compiled.", [problem]))
    rows, chips = arguments.global_batch, _config_chips(source, arguments)
    spec, _ = source.load()
    result = plan(
        spec, arguments.target, global_batch=rows, overlap=arguments.overlap, hardware=chips
    )
    if arguments.compile:
        with make_console(stderr=True).status("compiling") as status:
            result = compile_best(
                result, source, arguments.compile, global_batch=rows, progress=status.update
            )
    if arguments.json:
        write_output(Path(arguments.json), result.to_json())
    if arguments.plot:
        result.plot(arguments.plot)
    make_console(soft_wrap=True).print(str(result))
    return 0


def _config_chips(source: StepSource, arguments: argparse.Namespace) -> tuple[Chip, ...]:
    """Returns the chips that the config adds to the hardware table.

    Raises:
      ConfigError: the target is such a chip, which no compiler knows, and layouts are to be
        compiled.
    """
    if source.is_function:
        return ()
    chips = load_config(source.name or None, [*source.overrides]).hardware
    named = [chip.name for chip in chips if f":{chip.name}:" in arguments.target]
    if named and arguments.compile and named[0] not in CHIPS:
        why = f"{named[0]} is the config's own chip, which no compiler knows"
        problem = Problem(f"--compile {arguments.compile}", why, "--compile 0")
        raise ConfigError(format_problems("The layouts cannot be compiled.", [problem]))
    return chips
