"""`shardkit convert FROM OUT`: a Hugging Face folder becomes a checkpoint, and the other way."""

import argparse
import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import CheckpointError, ConfigError, Problem, format_problems
from .._core.io._console import make_console
from .._core.io._files import local_path
from .._core.tree import format_bytes
from ..checkpoint import Checkpointer, Manifest, SavedStep
from ..config import Config, apply_overrides, from_record
from ..hf import decoder_config, load, save
from ..lm import Tuning, decoder_model
from ..mesh import MeshSpec, simulate_devices
from ..parallel import Strategy
from ..rules import format_mesh
from ..step import StepSpec
from ..sweeps._spec_factory import ready_strategies
from ._checkpoint import list_step_folders

_PARAMS, _ADAPTERS = "params", "lora"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    source, out = (local_path(p, CheckpointError) for p in (arguments.source, arguments.out))
    if arguments.like is not None:
        like = local_path(arguments.like, CheckpointError)
        params = _export(source, out, like, arguments.vocab_padding)
        console.print(f"{out}: {_describe(params)}, a Hugging Face folder")
        return 0
    text = arguments.target_mesh
    mesh_spec = apply_overrides(Config(), [f"mesh={text}"]).mesh if text else MeshSpec(fsdp=1)
    simulate_devices(mesh_spec.size)
    mesh = mesh_spec.build(f"cpu:{mesh_spec.size}")
    params = _import(source, out, mesh, arguments.vocab_padding, ignore=arguments.ignore)
    console.print(f"{out}: {_describe(params)}, step 0 in the layout of {format_mesh(mesh.shape)}")
    return 0


def _describe(params: Any) -> str:
    leaves = jax.tree.leaves(params)
    size = format_bytes(sum(x.nbytes for x in leaves))
    return f"{sum(x.size for x in leaves):,} parameters, {size}"


def _import(source: Path, out: Path, mesh: Mesh, padding: int, *, ignore: Sequence[str]) -> Any:
    """Saves the weights of a Hugging Face folder as step 0 of a checkpoint folder."""
    model = decoder_model(decoder_config(source, ignore=ignore, vocab_padding=padding))
    tokens = jax.ShapeDtypeStruct((mesh.size, 8), np.int32)
    spec = StepSpec(
        loss_fn=model.loss_fn,
        optimizer=optax.identity(),
        init=model.init,
        batch=dict.fromkeys(("inputs", "targets", "weights"), tokens),
        strategy=_make_strategy(mesh),
    )
    params = load(source, spec, mesh, vocab_padding=padding)
    Checkpointer(out).save(0, {_PARAMS: params})
    return params


def _make_strategy(mesh: Mesh) -> Strategy:
    """Joins the built-in strategies of the mesh's axes."""
    known = ready_strategies()
    if unknown := [axis for axis in mesh.axis_names if axis not in known]:
        why = f"has no built-in strategy; known: {', '.join(known)}"
        problems = [Problem(f"--target-mesh: axis {axis!r}", why) for axis in unknown]
        raise ConfigError(format_problems("The mesh has no strategy.", problems))
    return functools.reduce(operator.or_, (known[axis]() for axis in mesh.axis_names))


def _export(source: Path, out: Path, like: Path, padding: int) -> Any:
    """Writes the parameters of the newest step as a Hugging Face folder."""
    folder = list_step_folders(source)[-1]
    manifest = SavedStep.open(folder).manifest
    device = Mesh(np.array(jax.devices()[:1]), ("one",))
    restored = Checkpointer(folder.parent).restore(
        _abstract_params(manifest),
        NamedSharding(device, PartitionSpec()),
        step=manifest.step,
        partial={f"{_PARAMS}/**": "saved", "**": "drop"},
    )
    recorded = (manifest.config or {}).get("model")
    if not padding and isinstance(recorded, Mapping):  # a run of `shardkit train`
        padding = recorded.get("vocab_padding", 0)
    params = _merge_adapters(restored.state[_PARAMS], manifest)
    save(out, params, like=like, vocab_padding=padding)
    return params


def _merge_adapters(params: Any, manifest: Manifest) -> Any:
    """Returns the weights of the decoder itself; the record of a run says what its adapters are."""
    if _ADAPTERS not in params:
        return params
    config = from_record(manifest.config or {}, "the checkpoint")
    return Tuning(config.decoder, config.lora, None, config.train).merge(params)


def _abstract_params(manifest: Manifest) -> dict[str, Any]:
    """Returns the saved parameters as nested dicts of their shapes."""
    tree: dict[str, Any] = {}
    for path, leaf in manifest.leaves.items():
        *above, name = path.split("/")
        if above[:1] == [_PARAMS]:
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)
            node[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return tree
