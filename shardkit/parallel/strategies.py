"""Ready strategies for models that carry the conventional logical names; join them with `|`."""

from ._context import context
from ._data import data
from ._expert import expert
from ._fsdp import fsdp
from ._own import own
from ._pipeline import pipeline
from ._tensor import tensor
from ._zero import zero

__all__ = ["context", "data", "expert", "fsdp", "own", "pipeline", "tensor", "zero"]
