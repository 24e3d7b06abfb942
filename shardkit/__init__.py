"""shardkit: declare a mesh and specs; compile, prove and run one SPMD training step in JAX."""

from . import data
from ._compression import Compression
from ._constrain import constrain
from ._errors import (
    BatchError,
    BudgetError,
    CheckpointError,
    ConfigError,
    DamageError,
    DataError,
    MeshError,
    ProcessError,
    ReportError,
    RetraceWarning,
    ShardingError,
    ShardkitError,
    StateError,
    StepError,
    SweepError,
    VerificationError,
)
from ._precision import Precision
from ._remat import remat
from ._shards import PerShard, shard_max, shard_start, shard_sum
from ._staged import staged
from ._types import Accumulate, Loss, Mean, Named, Variables
from ._weight import weight
from .adapters import Model, from_linen, from_nnx
from .checkpoint import Checkpointer, RetentionPolicy
from .config import Config
from .hardware import Chip
from .inspect import Budget, Report
from .mesh import MeshSpec, simulate_devices
from .models import attention, experts, route
from .parallel import Strategy, strategies
from .plan import Plan, Space, plan
from .processes import Peers, distributed
from .rules import REPLICATED, AxisRules, PathRules, chain, explain, shard_largest
from .run import Callback, TrainConfig, Trainer
from .run.guards import Mismatch, check_replicas, replay
from .state import TrainState
from .step import CompiledStep, Declaration, compile_step, released
from .sweep import Sweep, sweep
from .verify import Certificate, verify

__all__ = [
    "REPLICATED",
    "Accumulate",
    "AxisRules",
    "BatchError",
    "Budget",
    "BudgetError",
    "Callback",
    "Certificate",
    "CheckpointError",
    "Checkpointer",
    "Chip",
    "CompiledStep",
    "Compression",
    "Config",
    "ConfigError",
    "DamageError",
    "DataError",
    "Declaration",
    "Loss",
    "Mean",
    "MeshError",
    "MeshSpec",
    "Mismatch",
    "Model",
    "Named",
    "PathRules",
    "Peers",
    "PerShard",
    "Plan",
    "Precision",
    "ProcessError",
    "Report",
    "ReportError",
    "RetentionPolicy",
    "RetraceWarning",
    "ShardingError",
    "ShardkitError",
    "Space",
    "StateError",
    "StepError",
    "Strategy",
    "Sweep",
    "SweepError",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "Variables",
    "VerificationError",
    "attention",
    "chain",
    "check_replicas",
    "compile_step",
    "constrain",
    "data",
    "distributed",
    "experts",
    "explain",
    "from_linen",
    "from_nnx",
    "plan",
    "released",
    "remat",
    "replay",
    "route",
    "shard_largest",
    "shard_max",
    "shard_start",
    "shard_sum",
    "simulate_devices",
    "staged",
    "strategies",
    "sweep",
    "verify",
    "weight",
]
