"""shardkit: declare a mesh and specs; compile, prove and run one SPMD training step in JAX."""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from . import data as data
    from . import errors as errors
    from . import nn as nn
    from ._compression import Compression as Compression
    from ._constrain import constrain as constrain
    from ._errors import BatchError as BatchError
    from ._errors import BudgetError as BudgetError
    from ._errors import CheckpointError as CheckpointError
    from ._errors import ConfigError as ConfigError
    from ._errors import DamageError as DamageError
    from ._errors import DataError as DataError
    from ._errors import MeshError as MeshError
    from ._errors import ProcessError as ProcessError
    from ._errors import ReportError as ReportError
    from ._errors import RetraceWarning as RetraceWarning
    from ._errors import ShardingError as ShardingError
    from ._errors import ShardkitError as ShardkitError
    from ._errors import StateError as StateError
    from ._errors import StepError as StepError
    from ._errors import SweepError as SweepError
    from ._errors import TreeError as TreeError
    from ._errors import VerificationError as VerificationError
    from ._precision import Precision as Precision
    from ._remat import remat as remat
    from ._shards import PerShard as PerShard
    from ._shards import shard_max as shard_max
    from ._shards import shard_start as shard_start
    from ._shards import shard_sum as shard_sum
    from ._staged import staged as staged
    from ._types import Accumulate as Accumulate
    from ._types import Loss as Loss
    from ._types import Mean as Mean
    from ._types import Named as Named
    from ._types import Variables as Variables
    from ._weight import weight as weight
    from .adapters import Model as Model
    from .adapters import from_linen as from_linen
    from .adapters import from_nnx as from_nnx
    from .checkpoint import Checkpointer as Checkpointer
    from .checkpoint import RetentionPolicy as RetentionPolicy
    from .config import Config as Config
    from .hardware import Chip as Chip
    from .inspect import Budget as Budget
    from .inspect import Report as Report
    from .mesh import MeshSpec as MeshSpec
    from .mesh import simulate_devices as simulate_devices
    from .models import attention as attention
    from .models import experts as experts
    from .models import route as route
    from .parallel import Strategy as Strategy
    from .parallel import strategies as strategies
    from .plan import Plan as Plan
    from .plan import Space as Space
    from .plan import plan as plan
    from .processes import Peers as Peers
    from .processes import distributed as distributed
    from .rules import REPLICATED as REPLICATED
    from .rules import AxisRules as AxisRules
    from .rules import PathRules as PathRules
    from .rules import chain as chain
    from .rules import explain as explain
    from .rules import shard_largest as shard_largest
    from .run import Callback as Callback
    from .run import TrainConfig as TrainConfig
    from .run import Trainer as Trainer
    from .run.guards import Mismatch as Mismatch
    from .run.guards import check_replicas as check_replicas
    from .run.guards import replay as replay
    from .state import TrainState as TrainState
    from .step import CompiledStep as CompiledStep
    from .step import StepSpec as StepSpec
    from .step import compile_step as compile_step
    from .sweep import Sweep as Sweep
    from .sweep import sweep as sweep
    from .verify import Certificate as Certificate
    from .verify import verify as verify
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "Accumulate": "._types",
            "AxisRules": ".rules",
            "BatchError": "._errors",
            "Budget": ".inspect",
            "BudgetError": "._errors",
            "Callback": ".run",
            "Certificate": ".verify",
            "CheckpointError": "._errors",
            "Checkpointer": ".checkpoint",
            "Chip": ".hardware",
            "CompiledStep": ".step",
            "Compression": "._compression",
            "Config": ".config",
            "ConfigError": "._errors",
            "DamageError": "._errors",
            "DataError": "._errors",
            "Loss": "._types",
            "Mean": "._types",
            "MeshError": "._errors",
            "MeshSpec": ".mesh",
            "Mismatch": ".run.guards",
            "Model": ".adapters",
            "Named": "._types",
            "PathRules": ".rules",
            "Peers": ".processes",
            "PerShard": "._shards",
            "Plan": ".plan",
            "Precision": "._precision",
            "ProcessError": "._errors",
            "REPLICATED": ".rules",
            "Report": ".inspect",
            "RetentionPolicy": ".checkpoint",
            "ReportError": "._errors",
            "RetraceWarning": "._errors",
            "ShardingError": "._errors",
            "ShardkitError": "._errors",
            "Space": ".plan",
            "StateError": "._errors",
            "StepError": "._errors",
            "StepSpec": ".step",
            "Strategy": ".parallel",
            "Sweep": ".sweep",
            "SweepError": "._errors",
            "TrainConfig": ".run",
            "TrainState": ".state",
            "Trainer": ".run",
            "TreeError": "._errors",
            "Variables": "._types",
            "VerificationError": "._errors",
            "attention": ".models",
            "chain": ".rules",
            "check_replicas": ".run.guards",
            "compile_step": ".step",
            "constrain": "._constrain",
            "data": None,
            "distributed": ".processes",
            "errors": None,
            "experts": ".models",
            "explain": ".rules",
            "from_linen": ".adapters",
            "from_nnx": ".adapters",
            "nn": None,
            "plan": ".plan",
            "remat": "._remat",
            "replay": ".run.guards",
            "route": ".models",
            "shard_largest": ".rules",
            "shard_max": "._shards",
            "shard_start": "._shards",
            "shard_sum": "._shards",
            "simulate_devices": ".mesh",
            "staged": "._staged",
            "strategies": ".parallel",
            "sweep": ".sweep",
            "verify": ".verify",
            "weight": "._weight",
        },
    )
