"""`shardkit checkpoint inspect|verify DIR`: what is saved there, and whether it is whole."""

import argparse
from pathlib import Path

from rich.console import Console

from .._core.errors import CheckpointError, Problem, format_problems
from .._core.io._console import make_console, print_table
from .._core.io._table import Table
from .._core.tree import format_bytes
from ..checkpoint import Checkpointer, Manifest, SavedStep


def saved_steps(folder: Path) -> list[Path]:
    """Folders of the complete steps of a run, of its checkpoints, or the one step that is named.

    Raises:
      CheckpointError: there are none.
    """
    if (folder / "manifest.json").exists():
        return [folder]
    for root in (folder, folder / "checkpoints"):
        if steps := Checkpointer(root).steps():
            return [root / f"step-{step:08d}" for step in steps]
    there = sorted(path.name for path in folder.glob("*"))[:4]
    why = f"holds {', '.join(there)}" if there else "is empty, or no folder"
    fix = "the folder of a run, its checkpoints/ or one checkpoints/step-…"
    problem = Problem(str(folder), why, fix)
    raise CheckpointError(format_problems("There is no checkpoint.", [problem]))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    folders = saved_steps(Path(arguments.folder))
    if arguments.way == "verify":
        return _verify(folders, arguments.values, console)
    print_table(console, _history(folders))
    newest = SavedStep.open(folders[-1]).manifest
    console.print()
    _facts(newest, console)
    print_table(console, _leaves(newest))
    return 0


def _verify(folders: list[Path], values: bool, console: Console) -> int:
    """Checks every step, and says all that is wrong with all of them."""
    damaged = 0
    for folder in folders:
        try:
            saved = SavedStep.open(folder)
            saved.check_files()
            if values:
                saved.check_values()
        except CheckpointError as error:
            damaged += 1
            console.print(f"{error}", style="red")
            continue
        size = format_bytes(sum(one.bytes for one in saved.manifest.files.values()))
        what = f"{len(saved.manifest.files)} files, {size}"
        console.print(f"{folder}: whole ({what}{', every value' if values else ''})")
    return 1 if damaged else 0


def _history(folders: list[Path]) -> Table:
    rows, styles = [], {}
    for folder in folders:
        try:
            manifest = SavedStep.open(folder).manifest
        except CheckpointError:
            styles[len(rows)] = "red"
            rows.append((folder.name, "manifest is damaged"))
            continue
        size = format_bytes(sum(one.bytes for one in manifest.files.values()))
        scores = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
        rows.append((str(manifest.step), manifest.time, _mesh(manifest), size, scores))
    return Table(("step", "saved", "mesh", "size", "metrics"), rows, styles=styles)


def _mesh(manifest: Manifest) -> str:
    return " × ".join(f"{axis}={size}" for axis, size in manifest.mesh.items()) or "one device"


def _facts(manifest: Manifest, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"step {manifest.step}, written by {versions}")
    console.print(f"data {manifest.data}\n")


def _leaves(manifest: Manifest) -> Table:
    rows = []
    for path, leaf in manifest.leaves.items():
        axes = ", ".join(name or "-" for name in leaf.axes) if leaf.axes else ""
        rows.append((path, leaf.type, axes, leaf.fingerprint))
    return Table(("leaf", "type", "logical axes", "fingerprint"), rows)
