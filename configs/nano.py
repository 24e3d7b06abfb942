"""The smallest decoder, to see everything work once.

    shardkit train configs/nano.py

Expect half a minute on 2 cores, most of it compiling, and text that roughly resembles code.
"""

from shardkit.config import Config
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec


def config() -> Config:
    """Returns a run of 60 updates on 8 simulated devices."""
    return Config(
        name="nano",
        model=SIZES["nano"],
        data=DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01),
        mesh=MeshSpec(data=4, tensor=2),
        train=TextTrainConfig(steps=60, eval_every=0, sample=120),
    )
