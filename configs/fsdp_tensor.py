"""Two kinds of parallelism: weights over fsdp, products and the residual stream over tensor.

    shardkit train configs/fsdp_tensor.py --set train.steps=50

Expect the loss of the default run at every step. The large configs use this layout, here on a mesh
that a laptop can simulate. Four micro-batches are accumulated with one reduction per step.
"""

import dataclasses

from shardkit.config import Config
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns the default run as fsdp=2, tensor=4, with the residual stream split over length."""
    both = strategies.fsdp() | strategies.tensor(sequence=True)
    return dataclasses.replace(
        Config(),
        name="fsdp_tensor",
        mesh=MeshSpec(fsdp=2, tensor=4),
        strategy=dataclasses.replace(both, accumulate=4),
    )
