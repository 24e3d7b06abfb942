"""Every command there is."""

from ._checkpoint import CHECKPOINT
from ._command import Command
from ._declared import DECLARED
from ._hardware import HARDWARE
from ._launch import LAUNCH
from ._plot import PLOT
from ._replay import REPLAY
from ._tokenize import TOKENIZE

# The command line is closed: a command is added here, or among the declared, and nowhere else.
COMMANDS: tuple[Command, ...] = (*DECLARED, PLOT, CHECKPOINT, HARDWARE, LAUNCH, TOKENIZE, REPLAY)
