"""The commands about one declared step: what a config says, and which layout it should say."""

from ._command import Command
from ._explain import EXPLAIN
from ._plan import PLAN
from ._sweep import SWEEP
from ._train import TRAIN
from ._verify import VERIFY

DECLARED: tuple[Command, ...] = (TRAIN, EXPLAIN, VERIFY, PLAN, SWEEP)
