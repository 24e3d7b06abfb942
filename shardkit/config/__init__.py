"""`Config`: one frozen tree per run, loaded from Python files, with overrides from text."""

from ._compile import CompileConfig
from ._describe import FieldRow, describe_fields
from ._load import load_config, shipped_configs
from ._optimizer import OptimizerConfig
from ._override import apply_overrides
from ._pretrained import PretrainedDecoder
from ._record import from_record, run_record, to_record
from ._tree import Config

__all__ = [
    "CompileConfig",
    "Config",
    "FieldRow",
    "OptimizerConfig",
    "PretrainedDecoder",
    "apply_overrides",
    "describe_fields",
    "from_record",
    "load_config",
    "run_record",
    "shipped_configs",
    "to_record",
]
