"""Rows split over three axes: length over context, in a ring, besides fsdp and tensor.

    shardkit train configs/context.py

Expect the loss of `configs/nano.py` at every step, although each device holds half of every row:
ring attention passes keys and values between devices, and nothing else looks across the split. On
simulated devices this is slower than not splitting; use it for rows that do not fit on a device.
"""

from shardkit.config import Config
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns a run of 60 updates on 8 simulated devices."""
    return Config(
        name="context",
        model=SIZES["nano"],
        data=DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01),
        mesh=MeshSpec(fsdp=2, context=2, tensor=2),
        strategy=strategies.fsdp() | strategies.context() | strategies.tensor(sequence=True),
        train=TextTrainConfig(steps=60, eval_every=0, sample=120),
    )
