"""`shardkit sweep`: every mesh × accumulation × remat of a config, or of a function's steps."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._core.errors import Problem, SweepError, raise_all
from .._core.io._console import make_console
from ..config import load_config
from ..mesh import Target, offer_devices, simulate_devices
from ..sweeps import ConfigFactory, Factory, SweepRow, draw_plots, make_factory, sweep
from ..targets import StepSource
from ._source import find_source
from ._verify import make_ragged_batches


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    errors = make_console(stderr=True, soft_wrap=True)
    _check_plots(arguments)
    counts = _parse_numbers("--devices", arguments.devices)
    source = find_source(arguments, "--devices 8")
    swept = (_from_function if source.is_function else _from_config)(
        source, arguments.target, counts
    )
    result = sweep(
        swept.factory,
        out=Path(arguments.out or Path("sweeps") / swept.name),
        axes=_split_words(arguments.axes),
        devices=counts or None,
        accumulate=_parse_numbers("--accumulate", arguments.accumulate),
        remat=_split_words(arguments.remat, ";"),
        target=swept.target,
        verify=arguments.verify,
        time=True if arguments.time else None,
        batches=swept.batches,
        repeats=arguments.repeats,
        timeout=arguments.timeout,
        on_row=lambda row, done, total: errors.print(_format_progress(row, done, total)),
    )
    console.print(str(result))
    drawn = draw_plots(result) if arguments.plots else ()
    names = ", ".join(["rows.jsonl", "rows.csv", *(path.name for path in drawn)])
    console.print(f"\n{result.folder}: {names}")
    return 0 if result.ranked else 1


@dataclasses.dataclass(frozen=True)
class _Swept:
    """What to sweep."""

    factory: Factory | ConfigFactory  # makes the steps
    name: str  # of the folder
    target: str | None  # to compile for; None for the devices of this process
    batches: Sequence[Any] | None  # host batches; None for random ones


def _from_config(source: StepSource, target: str | None, counts: list[int]) -> _Swept:
    config = load_config(source.name or None, source.overrides)
    if target is None and Target.parse(config.devices).kind not in ("local", "cpu"):
        target = config.devices
    if target is None:
        _simulate(config.devices, counts)
    factory = ConfigFactory(source.name, source.overrides)
    return _Swept(factory, config.name, target, make_ragged_batches(config))


def _from_function(source: StepSource, target: str | None, counts: list[int]) -> _Swept:
    """A function declares no devices: it uses those of the process, or `counts` simulated ones."""
    if target is None and counts:
        offer_devices(max(counts))
    return _Swept(make_factory(source.name), source.name.partition(":")[2], target, None)


def _format_progress(row: SweepRow, done: int, total: int) -> str:
    """Returns one line of progress."""
    time = "" if row.seconds is None else f", {1e3 * row.seconds:.3g} ms a step"
    return (
        f"[{done}/{total}] {row.case.key} {row.status}{f': {row.reason}' if row.reason else time}"
    )


def _simulate(devices: str, counts: list[int]) -> None:
    """Simulates as many CPU devices as the largest mesh has, unless the config's are real."""
    target = Target.parse(devices)
    if target.kind == "cpu" and target.n_devices is not None:
        simulate_devices(max(counts, default=target.n_devices))


def _split_words(text: str | None, separator: str = ",") -> list[str]:
    return [word.strip() for word in (text or "").split(separator) if word.strip()]


def _parse_numbers(option: str, text: str | None) -> list[int]:
    words = _split_words(text)
    wrong = [
        Problem(f"{option} {word}", "is not a number") for word in words if not word.isdecimal()
    ]
    raise_all(SweepError, "The option takes numbers.", wrong, f"{option} 1,2,4")
    return [int(word) for word in words]


def _check_plots(arguments: argparse.Namespace) -> None:
    """Refuses plots without a library to draw them, before hours of compiling."""
    if arguments.plots and importlib.util.find_spec("matplotlib") is None:
        fix = 'pip install "shardkit[plot]"'
        raise SweepError.of("Nothing can be drawn.", "--plots", "matplotlib is not installed", fix)
