"""Adapters: a flax module becomes the `init` and `loss_fn` that a step is compiled from."""

from ._linen import from_linen
from ._model import Model
from ._nnx import from_nnx

__all__ = [
    "Model",
    "from_linen",
    "from_nnx",
]
