"""The decoder's loss: weighted next-token cross entropy whose logits need not live at once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._staged import staged
from .._types import Mean
from ._cross_entropy import cross_entropy
from ._decoder import Decoder


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
      `Mean(total, weight)` in nats, f32[] each, and the metric `accuracy`, a `Mean` too.
    """
    config = model.config

    def last(
        ends: Mapping[str, jax.Array], x: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[Mean, dict[str, Mean]]:
        hidden = model.hidden(ends, x)
        weights = batch["weights"].astype(jnp.float32)
        with jax.named_scope("loss"):
            lse, label, top = cross_entropy(
                hidden, model.output_table(ends), batch["targets"], config.loss_chunks
            )
            losses = lse - label + config.z_loss * lse**2
            total, weight = (weights * losses).sum(), weights.sum()
            right = (weights * (label >= top)).sum()
        return Mean(total, weight), {"accuracy": Mean(right, weight)}

    layer = model.layer(batch["inputs"].shape[1])
    ends, weights = model.ends(), model.layers.weights()
    return staged(model.embed, layer, last, ends, weights, batch, model.dropout_key(key))
