"""Three kinds of parallelism at once: rows over data, layers over pipe, products over tensor.

    shardkit train configs/pipeline.py

The smallest decoder on 8 simulated devices, its layers in two stages, four micro-batches in 1F1B
order. Expect the loss of `configs/nano.py` at every step, since the data and the seed are the
same. On simulated devices it says nothing about speed.
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
