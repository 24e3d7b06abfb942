"""Low-rank adapters in nnx's idiom: `nnx.LoRA` beside frozen layers, only `LoRAParam` trained."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._models_gemma import nest_lists
from ._third_party import UNMARKED, Model, layouts


class Net(nnx.Module):
    def __init__(self, rngs):
        normal = nnx.initializers.normal(0.5)
        options = {"lora_rank": 2, "b_initializer": normal, "rngs": rngs}
        self.up = nnx.LoRALinear(8, 32, **options)
        self.down = nnx.LoRALinear(32, 4, **options)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def build():
    rng = np.random.default_rng(8)
    adapted = sk.from_nnx(Net, loss, trainable=nnx.LoRAParam)

    def plain(params, model_state, rows):
        graph, state = nnx.split(Net(nnx.Rngs(0)))
        frozen = {
            layer: {k: x if k == "lora" else jax.lax.stop_gradient(x) for k, x in leaves.items()}
            for layer, leaves in params.items()
        }
        nnx.replace_by_pure_dict(state, nest_lists(frozen))
        return loss(nnx.merge(graph, state), rows), jnp.ones(()), model_state

    return Model(
        adapted.init,
        adapted.loss_fn,
        {
            "x": rng.normal(size=(16, 8)).astype(np.float32),
            "y": rng.normal(size=(16, 4)).astype(np.float32),
        },
        plain,
        layouts({"up/lora/lora_b": P(None, "tensor"), "down/lora/lora_a": P("tensor")}),
        refused=(UNMARKED,),
        extra=lambda opt_state: {k: opt_state[0].trace[k]["lora"] for k in ("up", "down")},
    )
