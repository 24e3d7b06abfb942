"""`shardkit explain`: what a declaration becomes on a target, or how two reports differ."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from .._core.errors import ConfigError, Problem, ReportError, format_problems, raise_all
from .._core.io._console import make_console
from .._core.io._outputs import check_outputs, write_output
from ..config import load_config
from ..hardware import Chip, find_chip
from ..report import Report, compare
from ..targets import StepSource, compile_for
from ._source import source_of

_REPORT = ".json"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    if arguments.other:
        names = (arguments.config, arguments.other)
        _compiled_already(" and ".join(names), arguments)
        console.print(str(compare(*map(_read, names))))
        return 0
    check_outputs({"--json": arguments.json, "--html": arguments.html})
    report = _report(arguments)
    if arguments.json:
        write_output(Path(arguments.json), report.to_json())
    if arguments.html:
        write_output(Path(arguments.html), report.to_html())
    if arguments.json != "-":
        console.print(str(report))
    return 0


def _report(arguments: argparse.Namespace) -> Report:
    name = arguments.config or ""
    if name.endswith(_REPORT):
        _compiled_already(name, arguments)
        return _read(name)
    source = source_of(arguments, "--target cpu:8")
    target = arguments.target or _default_target(source)
    chip = _chip(arguments.chip, source)
    errors = make_console(stderr=True)
    what = f"compiling for {target}"
    if not errors.is_terminal:
        errors.print(f"{what} ...")
        lines = _Lines(lambda seconds: errors.print(f"{what}: {seconds:.0f} s"))
        return compile_for(source, target, chip=chip, timeout=arguments.timeout, progress=lines)
    with errors.status(what) as status:
        return compile_for(
            source,
            target,
            chip=chip,
            timeout=arguments.timeout,
            progress=lambda seconds: status.update(f"{what}: {seconds:.0f} s"),
        )


@dataclasses.dataclass
class _Lines:
    """Says how long it has been once a minute, where no line can be written again."""

    say: Callable[[float], None]
    minutes: int = 0

    def __call__(self, seconds: float) -> None:
        if seconds // 60 > self.minutes:
            self.minutes = int(seconds // 60)
            self.say(seconds)


def _compiled_already(name: str, arguments: argparse.Namespace) -> None:
    """Refuses what would have to be known before a report was compiled."""
    given = [f"--set {one}" for one in arguments.overrides]
    given += [f"--target {arguments.target}"] if arguments.target else []
    given += [f"--chip {arguments.chip}"] if arguments.chip else []
    why = "a saved report is what was compiled; nothing can be changed in it"
    fix = f"shardkit explain CONFIG {' '.join(given)}"
    problems = [Problem(one, why) for one in given]
    raise_all(ConfigError, f"{name}: opened, not compiled.", problems, fix)


def _chip(name: str | None, source: StepSource) -> Chip | None:
    """A chip of the hardware table, or of the config."""
    if name is None:
        return None
    own = (
        () if source.is_function else load_config(source.name or None, [*source.overrides]).hardware
    )
    return find_chip(name, own)


def _default_target(source: StepSource) -> str:
    if source.is_function:
        why = "a function declares no devices"
        problem = Problem(source.name, why, f"shardkit explain {source.name} --target cpu:8")
        raise ConfigError(format_problems("There is no target.", [problem]))
    return load_config(source.name or None, list(source.overrides)).devices


def _read(name: str) -> Report:
    if not Path(name).is_file():
        problem = Problem(name, "there is no such report", "shardkit explain CONFIG --json FILE")
        raise ConfigError(format_problems("There is nothing to read.", [problem]))
    try:
        text = Path(name).read_text("utf-8")
    except UnicodeDecodeError:
        problem = Problem(name, "is no text", "shardkit explain CONFIG --json FILE")
        raise ReportError(format_problems("This is no report.", [problem])) from None
    return Report.from_json(text)
