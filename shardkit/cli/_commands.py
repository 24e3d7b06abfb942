"""Every command there is. A command's module is imported when it runs, not for its help."""

import argparse
import importlib
from collections.abc import Callable

from . import _options as options
from ._command import Command


def _in(module: str) -> Callable[[argparse.Namespace], int]:
    """`run` of a module of this package, imported when it is called."""

    def run(arguments: argparse.Namespace) -> int:
        return importlib.import_module(module, __package__).run(arguments)

    return run


# The command line is closed: a command is added here, and nowhere else.
COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "train a decoder on text; without CONFIG the default run",
        _in("._train"),
        options.add_train_options,
    ),
    Command(
        "explain",
        "what a config, or module:function, becomes on a target",
        _in("._explain"),
        options.add_explain_options,
    ),
    Command(
        "verify",
        "prove that the step gives the numbers of one device on every mesh",
        _in("._verify"),
        options.add_verify_options,
    ),
    Command(
        "plan",
        "which mesh for this model on these devices",
        _in("._plan"),
        options.add_plan_options,
    ),
    Command(
        "sweep",
        "try every mesh × accumulation × remat of a config, or module:function, and rank them",
        _in("._sweep"),
        options.add_sweep_options,
    ),
    Command(
        "plot",
        "draw loss and speed of runs",
        _in("._plot"),
        options.add_plot_options,
        takes_config=False,
    ),
    Command(
        "checkpoint",
        "show what a run has saved, or look for damage",
        _in("._checkpoint"),
        options.add_checkpoint_options,
        takes_config=False,
    ),
    Command(
        "hardware",
        "the chips that are known, with the source of each figure",
        _in("._hardware"),
        options.add_hardware_options,
        takes_config=False,
    ),
    Command(
        "launch",
        "run a command in several processes of this machine, for tests",
        _in("._launch"),
        options.add_launch_options,
        takes_config=False,
    ),
    Command(
        "tokenize",
        "turn text into token shards, once",
        _in("._tokenize"),
        options.add_tokenize_options,
        takes_config=False,
    ),
    Command(
        "replay",
        "make a step again that was not finite, and say where it went wrong",
        _in("._replay"),
        options.add_replay_options,
        takes_config=False,
    ),
)
