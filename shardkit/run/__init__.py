"""Training runs: the trainer, its loop, its folder, and how a run resumes."""

from ._config import TrainConfig as TrainConfig
from ._console import label_text as label_text
from ._console import show_mesh as show_mesh
from ._console import standard_output as standard_output
from ._history import History as History
from ._history import read_history as read_history
from ._plot import plot_runs as plot_runs
from ._source import DataSource as DataSource
from ._source import FunctionSource as FunctionSource
from ._source import IterableSource as IterableSource
from ._stop import Stopped as Stopped
from ._trainer import Trainer as Trainer
from .callbacks._callback import Callback as Callback
from .callbacks._callback import RunContext as RunContext
from .callbacks._callback import StepMetrics as StepMetrics
