"""Three kinds of parallelism: rows over data, layers over pipe, products over tensor.

    shardkit train configs/pipeline.py

The smallest decoder on 8 simulated devices, with its layers in two stages and four micro-batches
in 1F1B order. Expect the loss of `configs/nano.py` at every step, since data and seed are the
same. Simulated devices say nothing about speed.
"""

from shardkit.config import Config
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns a run of 60 updates as data=2, pipe=2, tensor=2."""
    stages = strategies.pipeline(micro_batches=4)
    return Config(
        name="pipeline",
        model=SIZES["nano"],
        data=DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01),
        mesh=MeshSpec(data=2, pipe=2, tensor=2),
        strategy=strategies.data() | stages | strategies.tensor(),
        train=TextTrainConfig(steps=60, eval_every=0, sample=120),
    )
