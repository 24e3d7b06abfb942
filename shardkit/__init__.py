"""shardkit: declare a mesh and specs; compile, prove and run one SPMD training step in JAX."""

from typing import TYPE_CHECKING

from ._core.startup import check_platform, lazy_names

check_platform()

if TYPE_CHECKING:
    from . import data as data
    from . import errors as errors
    from . import hf as hf
    from . import nn as nn
    from . import testing as testing
    from ._core.errors import RetraceWarning as RetraceWarning
    from ._core.errors import SavedStepWarning as SavedStepWarning
    from ._core.errors import ShardkitError as ShardkitError
    from ._core.precision import Precision as Precision
    from ._core.train_state import TrainState as TrainState
    from ._core.types import Accumulate as Accumulate
    from ._core.types import Loss as Loss
    from ._core.types import Mean as Mean
    from ._core.types import Variables as Variables
    from ._core.types import WithAxes as WithAxes
    from .adapters import Model as Model
    from .adapters import from_equinox as from_equinox
    from .adapters import from_linen as from_linen
    from .adapters import from_nnx as from_nnx
    from .checkpoint import Checkpointer as Checkpointer
    from .checkpoint import RetentionPolicy as RetentionPolicy
    from .config import Config as Config
    from .hardware import Chip as Chip
    from .mesh import MeshSpec as MeshSpec
    from .mesh import simulate_devices as simulate_devices
    from .nn._manual_axis_rules import ShardMapLoss as ShardMapLoss
    from .parallel import GradientCompression as GradientCompression
    from .parallel import Strategy as Strategy
    from .parallel import strategies as strategies
    from .parity import ParityReport as ParityReport
    from .parity import verify as verify
    from .peft import LoraModel as LoraModel
    from .peft import QuantizedModel as QuantizedModel
    from .peft import lora as lora
    from .peft import quantize as quantize
    from .planner import Plan as Plan
    from .planner import SearchSpace as SearchSpace
    from .planner import plan as plan
    from .processes import ProcessGroup as ProcessGroup
    from .processes import distributed as distributed
    from .report import Budget as Budget
    from .report import Report as Report
    from .rules import REPLICATED as REPLICATED
    from .rules import AxisRules as AxisRules
    from .rules import PathRules as PathRules
    from .rules import explain_rules as explain_rules
    from .rules import first_match as first_match
    from .rules import shard_largest as shard_largest
    from .run import Callback as Callback
    from .run import TrainConfig as TrainConfig
    from .run import Trainer as Trainer
    from .run.guards import Mismatch as Mismatch
    from .run.guards import check_replicas as check_replicas
    from .run.guards import replay as replay
    from .step import CompiledStep as CompiledStep
    from .step import SelfCheck as SelfCheck
    from .step import StepSpec as StepSpec
    from .step import compile_step as compile_step
    from .step import load_step as load_step
    from .sweeps import Sweep as Sweep
    from .sweeps import sweep as sweep
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "data errors hf nn testing": None,
            "RetraceWarning SavedStepWarning ShardkitError": "._core.errors",
            "Precision": "._core.precision",
            "TrainState": "._core.train_state",
            "Accumulate Loss Mean Variables WithAxes": "._core.types",
            "Model from_equinox from_linen from_nnx": ".adapters",
            "Checkpointer RetentionPolicy": ".checkpoint",
            "Config": ".config",
            "Chip": ".hardware",
            "MeshSpec simulate_devices": ".mesh",
            "ShardMapLoss": ".nn._manual_axis_rules",
            "GradientCompression Strategy strategies": ".parallel",
            "ParityReport verify": ".parity",
            "LoraModel QuantizedModel lora quantize": ".peft",
            "Plan SearchSpace plan": ".planner",
            "ProcessGroup distributed": ".processes",
            "Budget Report": ".report",
            "REPLICATED AxisRules PathRules explain_rules first_match shard_largest": ".rules",
            "Callback TrainConfig Trainer": ".run",
            "Mismatch check_replicas replay": ".run.guards",
            "CompiledStep SelfCheck StepSpec compile_step load_step": ".step",
            "Sweep sweep": ".sweeps",
        },
    )
