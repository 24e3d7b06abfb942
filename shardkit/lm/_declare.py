"""What a run on text declares: the reference decoder, its loss and its batches."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .._core.errors import ConfigError, Problem, raise_all
from ..adapters import Model, from_nnx
from ..data import DataConfig
from ..parallel import Strategy
from ..step import CompiledStep, StepSpec
from ._decoder import Decoder
from ._decoder_config import DecoderConfig
from ._lora import LoraConfig
from ._loss import decoder_loss


def decoder_model(config: DecoderConfig) -> Model:
    """Returns `init`, `loss_fn` and `bind` of the reference decoder."""
    return from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)


def batch_shapes(data: DataConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract batch of `Text.batch`: arrays [batch, length], all global rows."""
    shape = (data.batch_size, data.seq_len)
    dtypes: dict[str, Any] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    if data.packing or data.format == "json_lines":
        dtypes["segment_ids"] = np.int32
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def compile_run(
    model: DecoderConfig,
    data: DataConfig,
    mesh: Mesh,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    *,
    cache: Path | None = None,
    **options: Any,
) -> CompiledStep:
    """Compiles the step of a run on a mesh of real devices; see `declare_run`."""
    return declare_run(model, data, strategy, optimizer, **options).compile(mesh, cache=cache)


def declare_run(
    model: DecoderConfig,
    data: DataConfig,
    strategy: Strategy,
    optimizer: optax.GradientTransformation,
    *,
    lora: LoraConfig | None = None,
    **options: Any,
) -> StepSpec:
    """Declares the step of a run; compiles nothing.

    Args:
      model: the decoder.
      data: shapes of the batch.
      strategy: what is sharded over which axis.
      optimizer: an optax chain.
      lora: adapters, which alone are trained; None, or no rank: all weights are.
      **options: further fields of `StepSpec`: `mode`, `compiler_options`, ….

    Raises:
      ConfigError: the decoder cannot see rows of such a length, or several texts in one.
      StepError: the decoder lacks a weight that is to be adapted.
    """
    _check_positions(model, data)
    declared: Any = decoder_model(model)
    if lora is not None and lora.rank is not None:
        adapted = lora.adapt(declared)
        declared = lora.quantize_base(adapted) or adapted
    return StepSpec(
        loss_fn=declared.loss_fn,
        optimizer=optimizer,
        init=declared.init,
        batch=batch_shapes(data),
        strategy=strategy,
        **options,
    )


def _check_positions(model: DecoderConfig, data: DataConfig) -> None:
    if model.positions is None:
        return
    problems = []
    if data.seq_len > model.positions:
        why = f"is longer than the {model.positions} positions that the decoder has."
        fix = f"--set data.seq_len={model.positions}"
        problems.append(Problem(f"data.seq_len={data.seq_len}", why, fix))
    if data.packing:
        why = "starts texts in the middle of a row, where the decoder's learned positions differ."
        problems.append(Problem("data.packing=true", why, "--set data.packing=false"))
    raise_all(ConfigError, "The rows do not fit the decoder.", problems)
