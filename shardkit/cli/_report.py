"""`shardkit report`: the report of a step on a target, or how two saved reports differ."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from .._core.errors import ConfigError, Problem, ReportError, format_problems, raise_all
from .._core.io._console import make_console
from .._core.io._files import local_path
from .._core.io._outputs import check_outputs, write_output
from ..hardware import find_chip
from ..mesh import Target
from ..report import Report, compare, find_profile
from ..targets import StepSource, compile_for
from ._source import find_source

_SUFFIX = ".json"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    if arguments.other:
        _refuse_options_of_one(arguments)
        names = (arguments.config, arguments.other)
        _refuse_compile_options(" and ".join(names), arguments)
        console.print(str(compare(*map(_read_report, names))))
        return 0
    files = {"--json": arguments.json, "--html": arguments.html, "--trace": arguments.trace}
    check_outputs(files)
    if arguments.profile:
        find_profile(arguments.profile)  # before minutes of compiling
    report = _make_report(arguments)
    if arguments.profile:
        report = report.with_profile(arguments.profile)
    if arguments.trace:
        _check_timed(report, arguments)
        report.to_trace(arguments.trace)
    if arguments.json:
        write_output(Path(arguments.json), report.to_json())
    if arguments.html:
        write_output(Path(arguments.html), report.to_html())
    if arguments.json != "-":
        console.print(str(report.by_source() if arguments.why else report))
    return 0


def _refuse_options_of_one(arguments: argparse.Namespace) -> None:
    """Refuses options that say something of one report where two are compared."""
    given = {"--trace": arguments.trace, "--profile": arguments.profile}
    why = "is of one report, not of how two differ"
    fix = f"shardkit report {arguments.other}"
    problems = [
        Problem(f"{name} {value}", why, f"{fix} {name} {value}")
        for name, value in given.items()
        if value
    ]
    raise_all(ConfigError, "Two reports are compared without these options.", problems)


def _check_timed(report: Report, arguments: argparse.Namespace) -> None:
    """Refuses a trace of a step whose time is not modelled."""
    if report.timeline is None:
        device = report.device_kind or report.platform
        why = f"draws the modelled time, and {device} is not in the hardware table"
        fix = f"shardkit report {arguments.config or ''} --chip v5p --trace {arguments.trace}"
        problem = Problem(f"--trace {arguments.trace}", why, " ".join(fix.split()))
        raise ReportError(format_problems(f"No time is modelled for {report.name}.", [problem]))


def _make_report(arguments: argparse.Namespace) -> Report:
    """Reads a saved report, or compiles the step."""
    name = arguments.config or ""
    if name.endswith(_SUFFIX):
        _refuse_compile_options(name, arguments)
        return _read_report(name)
    source = find_source(arguments, "--target cpu:8")
    name = source.config.name if source.config else source.name
    return dataclasses.replace(_compile_report(source, arguments), name=name)


def _compile_report(source: StepSource, arguments: argparse.Namespace) -> Report:
    """Compiles the step and reports its progress on standard error."""
    target = arguments.target or _default_target(source)
    if arguments.trace and Target.parse(target).kind == "cpu" and not arguments.chip:
        why = f"draws the modelled time, and {target} has none: simulated devices have no speed"
        fix = f"shardkit report {source.name} --target {target} --chip v5p --trace FILE"
        raise ConfigError.of("No time is modelled.", f"--trace {arguments.trace}", why, fix)
    own_chips = source.config.hardware if source.config else ()
    chip = None if arguments.chip is None else find_chip(arguments.chip, own_chips)
    errors = make_console(stderr=True)
    task = f"compiling for {target}"
    if not errors.is_terminal:
        errors.print(f"{task} ...")
        progress = _OncePerMinute(lambda seconds: errors.print(f"{task}: {seconds:.0f} s"))
        return compile_for(source, target, chip=chip, timeout=arguments.timeout, progress=progress)
    with errors.status(task) as status:
        return compile_for(
            source,
            target,
            chip=chip,
            timeout=arguments.timeout,
            progress=lambda seconds: status.update(f"{task}: {seconds:.0f} s"),
        )


@dataclasses.dataclass
class _OncePerMinute:
    """Calls `show` once a minute with the seconds since the start."""

    show: Callable[[float], None]
    minutes: int = 0

    def __call__(self, seconds: float) -> None:
        if seconds // 60 > self.minutes:
            self.minutes = int(seconds // 60)
            self.show(seconds)


def _refuse_compile_options(name: str, arguments: argparse.Namespace) -> None:
    """Refuses options that only matter when a report is compiled."""
    options = [f"--set {override}" for override in arguments.overrides]
    options += [f"--target {arguments.target}"] if arguments.target else []
    options += [f"--chip {arguments.chip}"] if arguments.chip else []
    why = "cannot change a saved report, which is already compiled"
    fix = f"shardkit report CONFIG {' '.join(options)}"
    problems = [Problem(option, why) for option in options]
    raise_all(ConfigError, f"Options for compiling do not apply to {name}.", problems, fix)


def _default_target(source: StepSource) -> str:
    if source.config is None:
        why = "is a function, which declares no devices"
        fix = f"shardkit report {source.name} --target cpu:8"
        raise ConfigError.of("The target is missing.", source.name, why, fix)
    return source.config.devices


def _read_report(name: str) -> Report:
    file = local_path(name, ConfigError, "The report cannot be read.")
    if not file.is_file():
        fix = "shardkit report CONFIG --json FILE"
        raise ConfigError.of("The report cannot be read.", name, "does not exist", fix)
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        fix = "shardkit report CONFIG --json FILE"
        raise ReportError.of("The file is not a report.", name, "is not text", fix) from None
    return Report.from_json(text)
