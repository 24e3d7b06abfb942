"""What `CONFIG` on a command line names, loaded."""

import argparse

from .._core.errors import ConfigError, MeshError, Problem, format_problems
from ..config import Config, load_config
from ..mesh import Target, simulate_devices
from ..processes import membership, process_count
from ..targets import StepSource


def source_of(arguments: argparse.Namespace, example: str) -> StepSource:
    """What `CONFIG` names: a config file with its overrides, or a function, which has none.

    Args:
      arguments: of a command that takes `CONFIG` and `--set`.
      example: options of the command that a function is given instead.

    Raises:
      ConfigError: something of a function is to be set.
    """
    source = StepSource(arguments.config or "", tuple(arguments.overrides))
    if source.is_function and source.overrides:
        why = f"{source.name} is a function, not a config"
        problem = Problem(f"--set {source.overrides[0]}", why)
        fix = f"shardkit {arguments.command} {source.name} {example}, and change the function"
        raise ConfigError(format_problems("There is nothing to set.", [problem], fix))
    return source


def config_of(arguments: argparse.Namespace) -> Config:
    """Loads the config that a command line asks for, and simulates its devices.

    Call it before anything of JAX: simulated devices exist only when JAX has not started.
    """
    config = load_config(arguments.config, arguments.overrides)
    target = Target.parse(config.devices)
    if target.kind == "cpu" and target.n_devices is not None:
        simulate_devices(_share(target.n_devices, config.devices))
    return config


def _share(devices: int, target: str) -> int:
    """How many of the simulated devices are this process's.

    Raises:
      MeshError: they do not divide among the processes, or the launcher gave it others.
    """
    count, here = process_count() or 1, membership()
    given = here.devices if here else None
    if devices % count == 0 and given in (None, devices // count):
        return devices // count
    why = f"has {devices} devices for {count} processes"
    why += f" of {given} each" if given is not None else ""
    fix = f"--set devices=cpu:{(given or max(1, devices // count)) * count}"
    problem = Problem(f"devices={target}", why, fix)
    raise MeshError(format_problems("The devices do not divide.", [problem]))
