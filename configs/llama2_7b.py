"""Llama-2-7B on 64 TPU v5p chips: declare, compile and plan it on a laptop, train it elsewhere.

    shardkit train configs/llama2_7b.py --set devices=local

trains it on a machine that has the chips; set `data.path` to your own text, which is read as
bytes. On any other machine `shardkit train` reports that the chips are not available.
"""

import dataclasses

from shardkit.config import Config, OptimizerConfig
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns fsdp=16, tensor=4, bf16 products with f32 weights, 128 rows of 2048 bytes."""
    both = strategies.fsdp() | strategies.tensor(sequence=True)
    return Config(
        name="llama2_7b",
        model=SIZES["llama2-7b"],
        data=DataConfig(seq_len=2048, batch_size=128),
        devices="tpu:v5p:4x4x4",
        mesh=MeshSpec(fsdp=16, tensor=4),
        strategy=dataclasses.replace(both, remat="full", precision="bfloat16"),
        optimizer=OptimizerConfig(name="adamw", lr=3e-4),
        train=TextTrainConfig(steps=10_000, eval_every=500),
    )
