"""Adapters that turn a flax or Equinox module into the `init` and `loss_fn` of a `sk.StepSpec`."""

from ._equinox import from_equinox as from_equinox
from ._linen import from_linen as from_linen
from ._model import Model as Model
from ._nnx import from_nnx as from_nnx
