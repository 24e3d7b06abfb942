"""`Config`: one frozen tree per run, loaded from Python files, with overrides from text."""

from ._compile import CompileConfig
from ._load import load_config
from ._optimizer import OptimizerConfig
from ._override import apply_overrides
from ._record import from_record, to_record
from ._tree import Config

__all__ = [
    "CompileConfig",
    "Config",
    "OptimizerConfig",
    "apply_overrides",
    "from_record",
    "load_config",
    "to_record",
]
