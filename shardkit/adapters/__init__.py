"""Adapters that turn a flax or Equinox module into the `init` and `loss_fn` of a `sk.StepSpec`."""

from ._equinox import from_equinox
from ._linen import from_linen
from ._model import Model
from ._nnx import from_nnx

__all__ = [
    "Model",
    "from_equinox",
    "from_linen",
    "from_nnx",
]
