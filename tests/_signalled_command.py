"""A command in each of several processes: python -m tests._signalled_command WHAT WORD...

WHAT is a signal that process 1 sends to the launcher, or `differ`: each process has its own seed.
"""

import json
import os
import signal
import sys
import time

from shardkit.cli import main
from shardkit.data import Text


def process():
    """Index of this process."""
    return json.loads(os.environ["SHARDKIT_PROCESS"])["index"]


def slowly(what):
    """Delays every batch, and sends the signal at the third."""
    batch, made = Text.batch, []

    def slow(self, step, *rows):
        time.sleep(0.2)
        made.append(step)
        if process() == 1 and len(made) == 3:
            os.kill(os.getppid(), signal.Signals[what])
        return batch(self, step, *rows)

    Text.batch = slow


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "differ":
        words += ["--set", f"train.seed={process()}"]
    else:
        slowly(what)
    sys.exit(main(words))
