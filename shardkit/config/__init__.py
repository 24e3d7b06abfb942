"""`Config`: one frozen tree per run, loaded from Python files, with overrides from text."""

from ._compile import CompileConfig as CompileConfig
from ._describe import FieldRow as FieldRow
from ._describe import describe_fields as describe_fields
from ._load import load_config as load_config
from ._load import shipped_configs as shipped_configs
from ._optimizer import OptimizerConfig as OptimizerConfig
from ._override import apply_overrides as apply_overrides
from ._pretrained import PretrainedDecoder as PretrainedDecoder
from ._record import from_record as from_record
from ._record import run_record as run_record
from ._record import to_record as to_record
from ._tree import Config as Config
