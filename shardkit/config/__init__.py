"""One frozen tree per run, config files, and typed overrides from the command line."""

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
