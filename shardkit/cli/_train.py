"""`shardkit train`."""

import argparse

from .._core.errors import MeshError, Problem, format_problems
from ..config import to_record
from ..lm import train
from ..mesh import Target
from ..processes import distributed
from ..run import package_versions
from ._source import config_of


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if arguments.profile is not None:
        arguments.overrides = [*arguments.overrides, f"train.profile={arguments.profile}"]
    config = config_of(arguments)
    if Target.parse(config.devices).kind not in ("local", "cpu"):
        why = "only a compiler knows these devices here; a run needs some that are there."
        fix = "--set devices=local on their machine, or --set devices=cpu:8 with a small mesh"
        problem = Problem(f"devices={config.devices}", why, fix)
        raise MeshError(format_problems("There is nothing to train on.", [problem]))
    with distributed(step_timeout=config.train.step_timeout) as process_group:
        record = to_record(config)
        process_group.agree("config", config=record, versions=package_versions())
        train(
            name=config.name,
            model=config.model,
            data=config.data,
            mesh=config.mesh.build(config.devices),
            strategy=config.strategy,
            optimizer=config.optimizer.build(config.train.steps),
            loop=config.train,
            record=record,
            compiling=config.compile.arguments,
            process_group=process_group,
        )
    return 0
