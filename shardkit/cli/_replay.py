"""`shardkit replay DUMP`: repeats a step that was not finite on one device."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .._core.errors import CheckpointError
from .._core.io._console import make_console, show_task
from .._core.io._files import local_path
from .._core.precision import Precision
from .._core.types import Accumulate
from ..config import Config, from_record
from ..mesh import MeshSpec
from ..parallel import strategies
from ..run.guards import abstract_batch, dump_manifest, replay
from ..step import CompiledStep


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    folder = local_path(arguments.folder, CheckpointError)
    manifest = dump_manifest(folder)
    config = from_record(manifest.config or {}, str(folder))
    batch = abstract_batch(manifest.leaves)
    with show_task(make_console(stderr=True), "repeating the step on one device"):
        step = _compile_on_one_device(config, manifest.config or {}, batch)
        result = replay(folder, step)
    make_console(soft_wrap=True).print(str(result))
    return 0 if result.reproduced else 1


def _compile_on_one_device(config: Config, record: Mapping[str, Any], batch: Any) -> CompiledStep:
    """Compiles a run's step for one device, with the run's precision and accumulation."""
    before = record["strategy"]
    strategy = dataclasses.replace(
        strategies.data(),
        precision=_from_record(Precision, before["precision"]),
        accumulate=_from_record(Accumulate, before["accumulate"]),
    )
    declared = dataclasses.replace(config, strategy=strategy).step_spec()
    spec = dataclasses.replace(declared, batch=batch)
    return spec.compile(MeshSpec(data=1).build(devices=jax.devices()[:1]))


def _from_record(kind: type[Any], value: Any) -> Any:
    return kind(**value) if isinstance(value, dict) else value
