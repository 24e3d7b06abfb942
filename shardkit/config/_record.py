"""Converts a config to the plain values that a run records, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import ConfigError, Problem, format_problems
from ._override import apply_overrides
from ._pretrained import PretrainedDecoder
from ._tree import Config
from ._values import is_dataclass_type

# Groups whose records are plain values.
_PLAIN = ("model", "data", "optimizer", "train")
_OPTIONAL = ("lora",)  # which records of older runs lack


def to_record(config: Any) -> Any:
    """Returns a config as plain JSON values; other objects become their `repr`.

    >>> from shardkit.mesh import MeshSpec
    >>> to_record(MeshSpec(data=2))["sizes"], to_record(Config())["optimizer"]["name"]
    ([['data', 2]], 'muon')
    """
    if is_dataclass_type(type(config)):
        fields = dataclasses.fields(config)
        return {field.name: to_record(getattr(config, field.name)) for field in fields}
    if isinstance(config, PartitionSpec):
        return repr(config)
    if isinstance(config, tuple | list):
        return [to_record(item) for item in config]
    return config if isinstance(config, str | int | float | None) else repr(config)


def run_record(config: Config) -> dict[str, Any]:
    """Returns the record of a run: what its weights are, in place of where they are read from.

    The decoder that a folder describes is in `model`, the checksum of its files in `weights`.
    Raises ConfigError without such a folder or family, CheckpointError if its files cannot be read.
    """
    record = to_record(config) | {"lora": to_record(config.adapters)}
    if isinstance(config.model, PretrainedDecoder):
        weights = {"folder": config.model.weights, "fingerprint": config.model.fingerprint}
        record |= {"model": to_record(config.decoder), "weights": weights}
    return record


def from_record(record: Mapping[str, Any], where: str) -> Config:
    """Rebuilds model, data, optimizer and loop of a config from its record.

    Mesh and strategy are those of `Config()`: records hold the `repr` of their rules, which cannot
    be read back. Raises ConfigError, which names the record as `where`, if it is not one of a
    config, or has fields that this version does not have.
    """
    groups = [name for name in _PLAIN if isinstance(record.get(name), Mapping)]
    if len(groups) < len(_PLAIN):
        absent = ", ".join(name for name in _PLAIN if name not in groups)
        problem = Problem(where, f"has a record without {absent}")
        fix = "sk.replay(folder, step), with the step of that run for one device"
        raise ConfigError(format_problems("This is not a run of shardkit train.", [problem], fix))
    groups += [name for name in _OPTIONAL if isinstance(record.get(name), Mapping)]
    assigned = [f"{g}.{name}={_text(value)}" for g in groups for name, value in record[g].items()]
    return apply_overrides(Config(), assigned)


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
