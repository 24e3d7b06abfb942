"""Every command there is."""

from ._checkpoint import CHECKPOINT
from ._command import Command
from ._explain import EXPLAIN
from ._launch import LAUNCH
from ._plot import PLOT
from ._replay import REPLAY
from ._sweep import SWEEP
from ._tokenize import TOKENIZE
from ._train import TRAIN
from ._verify import VERIFY

# The command line is closed: a command is added here and nowhere else.
COMMANDS: tuple[Command, ...] = (
    TRAIN,
    EXPLAIN,
    VERIFY,
    SWEEP,
    PLOT,
    CHECKPOINT,
    LAUNCH,
    TOKENIZE,
    REPLAY,
)
