"""All commands. The module of a command is imported when it runs, not for its help."""

import argparse
import importlib
from collections.abc import Callable

from . import _options as options
from ._command import Command


def _import_late(module: str, name: str = "run") -> Callable[[argparse.Namespace], int]:
    """Returns a function of a module of this package; calling it imports the module."""

    def run(arguments: argparse.Namespace) -> int:
        return getattr(importlib.import_module(module, __package__), name)(arguments)

    return run


# The command line is closed: this is the only place to add a command.
COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "train a decoder on text; without CONFIG, the default run",
        _import_late("._train"),
        options.add_train_options,
    ),
    Command(
        "report",
        "memory, communication and time of a config, or module:function, on a target",
        _import_late("._report"),
        options.add_report_options,
    ),
    Command(
        "verify",
        "prove that the step's results match a single device on every mesh",
        _import_late("._verify"),
        options.add_verify_options,
    ),
    Command(
        "plan",
        "rank the meshes for this model on these devices",
        _import_late("._plan"),
        options.add_plan_options,
    ),
    Command(
        "sweep",
        "try all meshes × accumulation × remat of a config, or module:function, and rank them",
        _import_late("._sweep"),
        options.add_sweep_options,
    ),
    Command(
        "plot",
        "plot loss and speed of runs",
        _import_late("._tools", "run_plot"),
        options.add_plot_options,
        takes_config=False,
    ),
    Command(
        "checkpoint",
        "show the checkpoints of a run, or check them for damage",
        _import_late("._checkpoint"),
        options.add_checkpoint_options,
        takes_config=False,
    ),
    Command(
        "hardware",
        "list the known chips, with the source of each figure",
        _import_late("._tools", "run_hardware"),
        options.add_hardware_options,
        takes_config=False,
    ),
    Command(
        "launch",
        "run a command in several processes on this machine, for tests",
        _import_late("._tools", "run_launch"),
        options.add_launch_options,
        takes_config=False,
    ),
    Command(
        "tokenize",
        "encode text as token shards",
        _import_late("._tools", "run_tokenize"),
        options.add_tokenize_options,
        takes_config=False,
    ),
    Command(
        "replay",
        "repeat a step that was not finite, and find where it went wrong",
        _import_late("._replay"),
        options.add_replay_options,
        takes_config=False,
    ),
)
