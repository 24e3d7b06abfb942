"""Llama-3-8B on 64 H100 GPUs, 8 hosts of 8: declare and plan it on a laptop, train it elsewhere.

    shardkit train configs/llama3_8b.py --set devices=local

trains it on a machine that has the GPUs; set `data.path` to your own text, which is read as bytes.
On any other machine `shardkit train` reports that the GPUs are not available.
"""

import dataclasses

from shardkit.config import Config, OptimizerConfig
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns fsdp=8 across hosts, tensor=8 inside each, 64 rows of 8192 bytes."""
    both = strategies.fsdp() | strategies.tensor(sequence=True)
    return Config(
        name="llama3_8b",
        model=SIZES["llama3-8b"],
        data=DataConfig(seq_len=8192, batch_size=64),
        devices="gpu:h100:1x8x8",
        mesh=MeshSpec(fsdp=8, tensor=8),
        strategy=dataclasses.replace(both, remat="full", precision="bfloat16"),
        optimizer=OptimizerConfig(name="adamw", lr=3e-4),
        train=TextTrainConfig(steps=10_000, eval_every=500),
    )
