"""Loads what `CONFIG` on the command line names."""

import argparse

from .._core.errors import ConfigError, MeshError, Problem, format_problems
from ..config import Config, load_config
from ..mesh import Target, simulate_devices
from ..processes import membership, process_count
from ..targets import StepSource


def find_source(arguments: argparse.Namespace, example: str) -> StepSource:
    """Returns what `CONFIG` names: a config file with its overrides, or a function.

    With a function `--set` raises a ConfigError, whose fix shows `example` options.
    """
    source = StepSource(arguments.config or "", tuple(arguments.overrides))
    if source.is_function and source.overrides:
        why = f"{source.name} is a function, not a config"
        problem = Problem(f"--set {source.overrides[0]}", why)
        fix = f"shardkit {arguments.command} {source.name} {example}, and change the function"
        raise ConfigError(format_problems("A function has no fields to set.", [problem], fix))
    return source


def load_run_config(arguments: argparse.Namespace) -> Config:
    """Loads the config of the command line, and simulates its CPU devices.

    Call it before JAX starts a backend; afterwards devices can no longer be simulated.
    """
    config = load_config(arguments.config, arguments.overrides)
    target = Target.parse(config.devices)
    if target.kind == "cpu" and target.n_devices is not None:
        simulate_devices(_local_devices(target.n_devices, config.devices))
    return config


def _local_devices(devices: int, target: str) -> int:
    """How many devices this process simulates.

    Raises MeshError if they do not divide among the processes, or differ from the launcher's
    `--devices`.
    """
    count, launched = process_count() or 1, membership()
    declared = launched.devices if launched else None
    if devices % count == 0 and declared in (None, devices // count):
        return devices // count
    why = f"has {devices} devices for {count} processes"
    why += f" of {declared} each" if declared is not None else ""
    fix = f"--set devices=cpu:{(declared or max(1, devices // count)) * count}"
    raise MeshError.of("The devices do not divide.", f"devices={target}", why, fix)
