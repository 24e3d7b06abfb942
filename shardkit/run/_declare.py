"""What a run on text declares: the reference decoder, its loss and its batches."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ..adapters import Model, from_nnx
from ..data import DataConfig
from ..mesh import MeshSpec
from ..models import Decoder, DecoderConfig, decoder_loss
from ..parallel import Strategy
from ..step import CompiledStep, Declaration, compile_step


def decoder_model(config: DecoderConfig) -> Model:
    """The reference decoder as `init`, `loss_fn` and `bind`."""
    return from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def batch_shapes(data: DataConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Global shapes of a batch of text, [batch, length]: of what `Text.batch` returns."""
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
    compiling: Mapping[str, Any] | None = None,
) -> tuple[Model, CompiledStep]:
    """Compiles the step of a run on a mesh that is there, as `compiling` tells `compile_step`."""
    made = decoder_model(model)
    declared: dict[str, Any] = {"init": made.init, "batch": batch_shapes(data), "mesh": mesh}
    declared |= compiling or {}
    return made, compile_step(made.loss_fn, optimizer, strategy=strategy, **declared)


def declare_run(
    model: DecoderConfig,
    data: DataConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
) -> Declaration:
    """The step of a run, for a mesh that is declared and not built."""
    made = decoder_model(model)
    return Declaration(made.loss_fn, optimizer, made.init, batch_shapes(data), mesh, strategy)
