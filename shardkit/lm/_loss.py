"""The decoder's loss: weighted next-token cross entropy, with logits computed in chunks."""

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
      key: draws dropout; None for no dropout.

    Returns:
      `Mean(total, weight)` in nats, f32[] each, and the metric `accuracy`, a `Mean` too. With
      experts also `balance`, `entropy`, `max_load` and `dropped` of `router_statistics`, averaged
      over blocks; in training the total includes the routers' losses, summed over blocks.
    """
    config = model.config

    def last(
        outer: Mapping[str, jax.Array], x: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[Mean, dict[str, Mean]]:
        stream, sums = model.split_sums(x)
        hidden = model.hidden(outer, stream)
        weights = batch["weights"].astype(jnp.float32)
        with jax.named_scope("loss"):
            lse, label, top = cross_entropy(
                hidden,
                model.output_table(outer),
                batch["targets"],
                config.loss_chunks,
                model.logit_rule,
            )
            losses = lse - label + config.z_loss * lse**2
            total, weight = (weights * losses).sum(), weights.sum()
            correct = (weights * (label >= top)).sum()
        metrics = {"accuracy": Mean(correct, weight)}
        if sums:
            router_loss, statistics = _router_losses(config, sums, weight)
            total = total if model.deterministic else total + router_loss
            metrics |= statistics
        return Mean(total, weight), metrics

    layer = model.layer(batch["inputs"].shape[1])
    outer, weights = model.outer_params(), model.layer_params()
    arrays = {"outer_params": outer, "layers": weights, "batch": batch}
    return layer_stack(model.first, layer, last, **arrays, key=model.dropout_key(key))


def _router_losses(
    config: DecoderConfig, sums: Mapping[str, jax.Array], weight: jax.Array
) -> tuple[jax.Array, dict[str, Mean]]:
    """Returns the routers' losses, and their statistics as metrics."""
    totals = {name: rows.sum() for name, rows in sums.items()}
    loss = config.balance_loss * totals["balance"] + config.router_z_loss * totals["z"]
    names = ("balance", "entropy", "max_load", "dropped")
    return loss, {name: Mean(totals[name] / config.num_layers, weight) for name in names}
