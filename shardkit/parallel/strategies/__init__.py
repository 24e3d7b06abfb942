"""Ready strategies for models with the conventional logical names; combine them with `|`."""

from .._data import data
from .._fsdp import fsdp
from .._own import own
from .._tensor import tensor
from .._zero import zero
from ..context._context import context
from ..expert._expert import expert
from ..pipeline._pipeline import pipeline

__all__ = ["context", "data", "expert", "fsdp", "own", "pipeline", "tensor", "zero"]
