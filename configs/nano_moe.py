"""A small mixture of experts over three mesh axes.

    shardkit train configs/nano_moe.py

Expect a minute or two on 2 cores, most of it compiling. Each token is routed to 2 of 8 experts,
which are split over 2 devices. `shardkit report` shows its way there and back as two all-to-alls
over `expert` forward and two backward per layer. The metric `dropped` is the share of choices whose
expert was full; `balance` is 1 if all experts are used equally.
"""

from shardkit.config import Config
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns a run of 60 updates as data=2, expert=2, tensor=2 on 8 simulated devices."""
    return Config(
        name="nano_moe",
        model=SIZES["nano-moe"],
        data=DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01),
        mesh=MeshSpec(data=2, expert=2, tensor=2),
        strategy=strategies.data() | strategies.expert() | strategies.tensor(),
        train=TextTrainConfig(steps=60, eval_every=0, sample=120),
    )
