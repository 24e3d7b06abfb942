"""`shardkit checkpoint inspect|verify DIR`: shows saved steps, or checks them for damage."""

import argparse
from pathlib import Path

from rich.console import Console

from .._core.errors import CheckpointError
from .._core.io._console import make_console, print_table
from .._core.io._files import local_path
from .._core.io._table import Table
from .._core.tree import format_bytes
from ..checkpoint import Checkpointer, Manifest, SavedStep


def list_step_folders(folder: Path) -> list[Path]:
    """The folders of complete steps in a run, or the given step; raises CheckpointError if none."""
    if (folder / "manifest.json").exists():
        return [folder]
    for root in (folder, folder / "checkpoints"):
        if steps := Checkpointer(root).steps():
            return [root / f"step-{step:08d}" for step in steps]
    names = sorted(path.name for path in folder.glob("*"))[:4]
    why = f"holds {', '.join(names)}" if names else "is empty, or not a folder"
    fix = "the folder of a run, its checkpoints/ or one checkpoints/step-…"
    raise CheckpointError.of("There is no checkpoint.", str(folder), why, fix)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    folders = list_step_folders(local_path(arguments.folder, CheckpointError))
    if arguments.action == "verify":
        return _verify(folders, arguments.values, console)
    print_table(console, _make_step_table(folders))
    newest = SavedStep.open(folders[-1]).manifest
    console.print()
    _print_versions(newest, console)
    print_table(console, _make_leaf_table(newest))
    return 0


def _verify(folders: list[Path], values: bool, console: Console) -> int:
    """Checks every step, and prints everything that is wrong with any of them."""
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
        size = format_bytes(sum(file.bytes for file in saved.manifest.files.values()))
        checked = f"{len(saved.manifest.files)} files, {size}{', every value' if values else ''}"
        console.print(f"{folder}: intact ({checked})")
    return 1 if damaged else 0


def _make_step_table(folders: list[Path]) -> Table:
    rows, styles = [], {}
    for folder in folders:
        try:
            manifest = SavedStep.open(folder).manifest
        except CheckpointError:
            styles[len(rows)] = "red"
            rows.append((folder.name, "manifest is damaged"))
            continue
        size = format_bytes(sum(file.bytes for file in manifest.files.values()))
        scores = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
        mesh = " × ".join(f"{axis}={size}" for axis, size in manifest.mesh.items())
        cells = manifest.time, mesh or "one device", size, scores
        rows.append((str(manifest.step), *cells))
    return Table(("step", "saved", "mesh", "size", "metrics"), rows, styles=styles)


def _print_versions(manifest: Manifest, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"step {manifest.step}, written by {versions}")
    console.print(f"data {manifest.data}\n")


def _make_leaf_table(manifest: Manifest) -> Table:
    rows = []
    for path, leaf in manifest.leaves.items():
        axes = ", ".join(name or "-" for name in leaf.axes) if leaf.axes else ""
        rows.append((path, leaf.type, axes, leaf.fingerprint))
    return Table(("leaf", "type", "logical axes", "fingerprint"), rows)
