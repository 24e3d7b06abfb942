"""What a run on text declares: the reference decoder, its loss and its batches."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ..adapters import Model, from_nnx
from ..data import DataConfig
from ..parallel import Strategy
from ..step import CompiledStep, StepSpec
from ._decoder import Decoder
from ._decoder_config import DecoderConfig
from ._loss import decoder_loss


def decoder_model(config: DecoderConfig) -> Model:
    """Returns `init`, `loss_fn` and `bind` of the reference decoder."""
    return from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def batch_shapes(data: DataConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract batch of `Text.batch`: arrays [batch, length], all global rows."""
    shape = (data.batch_size, data.seq_len)
    dtypes: dict[str, Any] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    if data.packing:
        dtypes["segment_ids"] = np.int32
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def compile_run(
    model: DecoderConfig,
    data: DataConfig,
    mesh: Mesh,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> CompiledStep:
    """Compiles the step of a run on a mesh of real devices; see `declare_run`."""
    return declare_run(model, data, strategy, optimizer, **options).compile(mesh)


def declare_run(
    model: DecoderConfig,
    data: DataConfig,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> StepSpec:
    """Declares the step of a run; compiles nothing.

    Args:
      model: the decoder.
      data: shapes of the batch.
      strategy: what is sharded over which axis.
      optimizer: an optax chain.
      **options: further fields of `StepSpec`: `mode`, `compiler_options`, ….
    """
    decoder = decoder_model(model)
    return StepSpec(
        loss_fn=decoder.loss_fn,
        optimizer=optimizer,
        init=decoder.init,
        batch=batch_shapes(data),
        strategy=strategy,
        **options,
    )
