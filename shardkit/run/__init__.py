"""Training runs: the trainer, its loop, its folder, and how a run resumes."""

from ._config import TrainConfig
from ._console import label_text, show_mesh, standard_output
from ._history import History, read_history
from ._plot import plot_runs
from ._source import DataSource, FunctionSource, IterableSource
from ._stop import Stopped
from ._trainer import Trainer
from .callbacks._callback import Callback, RunContext, StepMetrics

__all__ = [
    "Callback",
    "DataSource",
    "FunctionSource",
    "History",
    "IterableSource",
    "RunContext",
    "StepMetrics",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "label_text",
    "plot_runs",
    "read_history",
    "show_mesh",
    "standard_output",
]
