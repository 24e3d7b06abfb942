"""The default model with weights and optimizer state split over all devices.

    shardkit train configs/fsdp.py

Expect the loss of the default run at every step, and an eighth of its weights on each device.
Simulated devices say nothing about speed.
"""

import dataclasses

from shardkit.config import Config
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns the default run as fsdp=8."""
    return dataclasses.replace(
        Config(), name="fsdp", mesh=MeshSpec(fsdp=8), strategy=strategies.fsdp()
    )
