"""The decoder's loss: weighted next-token cross entropy whose logits need not live at once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.types import Mean
from ..nn._layer_stack import layer_stack
from ._cross_entropy import cross_entropy
from ._decoder import Decoder
from ._decoder_config import DecoderConfig


def decoder_loss(
    model: Decoder, batch: Mapping[str, jax.Array], key: jax.Array | None
) -> tuple[Mean, dict[str, Mean]]:
    """Returns the weighted mean of the tokens' losses, exact under any split of the batch.

    Args:
      model: the decoder.
      batch: `inputs` i32[batch, length], `targets` i32[batch, length], `weights` f32[batch, length]
        (0 where a target does not count), and optionally `segment_ids` i32[batch, length].
      key: draws dropout; None for none.

    Returns:
      `Mean(total, weight)` in nats, f32[] each, and the metric `accuracy`, a `Mean` too. With
      experts also `router_statistics`' `balance`, `entropy`, `max_load` and `dropped`, averaged
      over blocks; in training the total then holds the routers' losses, summed over blocks.
    """
    config = model.config

    def last(
        ends: Mapping[str, jax.Array], x: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[Mean, dict[str, Mean]]:
        stream, sums = model.parts(x)
        hidden = model.hidden(ends, stream)
        weights = batch["weights"].astype(jnp.float32)
        with jax.named_scope("loss"):
            lse, label, top = cross_entropy(
                hidden, model.output_table(ends), batch["targets"], config.loss_chunks
            )
            losses = lse - label + config.z_loss * lse**2
            total, weight = (weights * losses).sum(), weights.sum()
            right = (weights * (label >= top)).sum()
        metrics = {"accuracy": Mean(right, weight)}
        if sums:
            of_routers, statistics = _routers(config, sums, weight)
            total = total if model.deterministic else total + of_routers
            metrics |= statistics
        return Mean(total, weight), metrics

    layer = model.layer(batch["inputs"].shape[1])
    ends, weights = model.ends(), model.layers.weights()
    arrays = {"outer_params": ends, "layers": weights, "batch": batch}
    return layer_stack(model.first, layer, last, **arrays, key=model.dropout_key(key))


def _routers(
    config: DecoderConfig, sums: Mapping[str, jax.Array], weight: jax.Array
) -> tuple[jax.Array, dict[str, Mean]]:
    """The routers' part of the loss, and their statistics as metrics."""
    of = {name: rows.sum() for name, rows in sums.items()}
    total = config.balance_loss * of["balance"] + config.router_z_loss * of["z"]
    shown = ("balance", "entropy", "max_load", "dropped")
    return total, {name: Mean(of[name] / config.num_layers, weight) for name in shown}
