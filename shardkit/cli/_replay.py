"""`shardkit replay DUMP`: repeats a step that was not finite on one device."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from .._core.io._console import make_console
from .._core.precision import Precision
from .._core.types import Accumulate
from ..config import Config, from_record
from ..lm import decoder_model
from ..mesh import MeshSpec
from ..parallel import strategies
from ..run.guards import abstract_batch, dump_manifest, replay
from ..step import CompiledStep, compile_step


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    folder = Path(arguments.folder)
    manifest = dump_manifest(folder)
    config = from_record(manifest.config or {}, str(folder))
    step = _compile_on_one_device(config, manifest.config or {}, abstract_batch(manifest.leaves))
    result = replay(folder, step)
    make_console(soft_wrap=True).print(str(result))
    return 0 if result.reproduced else 1


def _compile_on_one_device(config: Config, record: Mapping[str, Any], batch: Any) -> CompiledStep:
    """Compiles a run's step for one device, with the run's precision and accumulation."""
    declared = record["strategy"]
    strategy = dataclasses.replace(
        strategies.data(),
        precision=_from_record(Precision, declared["precision"]),
        accumulate=_from_record(Accumulate, declared["accumulate"]),
    )
    model = decoder_model(config.model)
    return compile_step(
        model.loss_fn,
        config.optimizer.build(config.train.steps),
        init=model.init,
        batch=batch,
        mesh=MeshSpec(data=1).build(devices=jax.devices()[:1]),
        strategy=strategy,
    )


def _from_record(kind: type[Any], value: Any) -> Any:
    return kind(**value) if isinstance(value, dict) else value
