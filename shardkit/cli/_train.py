"""`shardkit train`: trains the decoder of a config on text."""

import argparse

from .._core.errors import MeshError
from .._core.versions import package_versions
from ..config import PretrainedDecoder, run_record
from ..lm import train
from ..mesh import Target
from ..processes import distributed
from ._source import load_run_config


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.profile is not None:
        arguments.overrides = [*arguments.overrides, f"train.profile={arguments.profile}"]
    config = load_run_config(arguments)
    if Target.parse(config.devices).kind not in ("local", "cpu"):
        why = "are devices of a compile target; a run needs devices of this machine."
        fix = "--set devices=local on their machine, or --set devices=cpu:8 with a small mesh"
        raise MeshError.of("The run has no devices.", f"devices={config.devices}", why, fix)
    pretrained = config.model.open() if isinstance(config.model, PretrainedDecoder) else None
    with distributed(step_timeout=config.train.step_timeout) as process_group:
        record = run_record(config)
        process_group.agree("config", config=record, versions=package_versions())
        train(
            name=config.name,
            model=config.decoder,
            data=config.encoded_data,
            mesh=config.mesh.build(config.devices),
            strategy=config.strategy,
            optimizer=config.optimizer.build(config.train.steps),
            loop=config.train,
            record=record,
            lora=config.adapters,
            pretrained=pretrained,
            compiling=config.compile.arguments,
            cache=config.compile.cache,
            process_group=process_group,
        )
    return 0
