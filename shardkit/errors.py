"""Every error that a user's declaration, config or data can cause, and the warnings."""

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

__all__ = [
    "BatchError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DamageError",
    "DataError",
    "MeshError",
    "ProcessError",
    "ReportError",
    "RetraceWarning",
    "ShardingError",
    "ShardkitError",
    "StateError",
    "StepError",
    "SweepError",
    "VerificationError",
]
