"""`shardkit train`."""

import argparse

from ..config import to_record
from ..run import train
from ._command import Command, config_of


def _run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    train(
        name=config.name,
        model=config.model,
        data=config.data,
        mesh=config.mesh.build(config.devices),
        strategy=config.strategy,
        optimizer=config.optimizer.build(config.train.steps),
        loop=config.train,
        record=to_record(config),
    )
    return 0


TRAIN = Command("train", "train a decoder on text; without CONFIG the default run", _run)
