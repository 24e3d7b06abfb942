"""`shardkit verify`: compares the config's step on several meshes with one device."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._core.errors import ShardingError, VerificationError, count
from .._core.io._console import make_console, show_task
from ..config import Config, apply_overrides
from ..mesh import MeshSpec, mesh_shapes
from ..parity import default_meshes, verify
from ..testing import kill_matrix
from ._source import load_run_config

# Without CONFIG: a decoder with 8 heads and rows that 3 divides, verified in minutes on two cores.
_SMALL = (
    "model=nano",
    "model.num_heads=8",
    "model.kv_heads=8",
    "data.seq_len=32",
    "data.batch_size=24",
)
_DROPOUT = 0.1
_MAX_MESHES = 8  # two of them of 6 and of 3 devices


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    if arguments.config is None:
        options = " ".join(f"--set {override}" for override in _SMALL)
        console.print(f"No CONFIG, so a small run: {options}")
        arguments.overrides = [*_SMALL, *arguments.overrides]
    config = _make_provable(load_run_config(arguments))
    console.print(
        f"Verified in float32, with dropout {config.decoder.dropout:g}; half of the rows have "
        "weight 0 everywhere.\n"
    )
    n_meshes = max(_MAX_MESHES, len(arguments.mesh or ()))
    factory = functools.lru_cache(n_meshes + 1)(config.step_spec().compile)
    errors = make_console(stderr=True)
    meshes = []
    for mesh in _build_meshes(arguments, config):
        with show_task(errors, f"compiling for mesh {_describe(mesh)}"):
            error = _find_error(mesh, factory)
        if error is None:
            meshes.append(mesh)
        else:
            console.print("Skipped: " + "\n  ".join(str(error).splitlines()) + "\n")
    if not arguments.mesh:
        meshes += default_meshes(tuple(config.mesh.axes), factory, odd_only=True)
    if not meshes:
        why = "no mesh fits this model"
        fix = f"--mesh {','.join(f'{axis}=1' for axis in config.mesh.axes)}, or other sizes"
        raise VerificationError.of("No mesh can be verified.", "--mesh", why, fix)
    batches = make_ragged_batches(config)
    with show_task(errors, f"comparing {count(len(meshes), 'mesh')} with one device"):
        report = verify(factory, meshes, batches=batches, steps=arguments.steps)
    console.print(str(report))
    if not arguments.mutations:
        return 0 if report.ok else 1
    mesh = max(meshes, key=lambda mesh: min(mesh.shape.values()))
    with show_task(errors, f"injecting bugs on mesh {_describe(mesh)}"):
        matrix = kill_matrix(factory, mesh, batches=batches, steps=arguments.steps)
    console.print(f"\nMutations on mesh {_describe(mesh)}:\n{matrix}")
    return 0 if report.ok and matrix.ok else 1


def _make_provable(config: Config) -> Config:
    """Returns the config in float32, with dropout, whose noise must not depend on the mesh."""
    model = dataclasses.replace(config.decoder, dropout=config.decoder.dropout or _DROPOUT)
    strategy = dataclasses.replace(config.strategy, precision="float32")
    return dataclasses.replace(config, model=model, strategy=strategy)


def make_ragged_batches(config: Config, n: int = 2) -> list[dict[str, np.ndarray]]:
    """Makes batches of random tokens, with weight 0 in the first half of the rows and at random."""
    rng = np.random.default_rng(config.data.seed)
    shape = (config.data.batch_size, config.data.seq_len)

    def make_batch() -> dict[str, np.ndarray]:
        tokens = rng.integers(0, config.decoder.vocab, (2, *shape), np.int32)
        weights = (rng.random(shape) < rng.random((shape[0], 1))).astype(np.float32)
        weights[: shape[0] // 2] = 0
        weights[-1] = 1  # even a batch of one row has a valid token
        batch = {"inputs": tokens[0], "targets": tokens[1], "weights": weights}
        if config.data.packing or config.data.format == "json_lines":
            cuts = rng.random(shape) < 4 / shape[1]
            batch["segment_ids"] = 1 + np.cumsum(cuts, 1, dtype=np.int32)
        return batch

    return [make_batch() for _ in range(n)]


def _build_meshes(arguments: argparse.Namespace, config: Config) -> list[Mesh]:
    if arguments.mesh:
        specs = [apply_overrides(config, [f"mesh={text}"]).mesh for text in arguments.mesh]
    else:
        shapes = mesh_shapes(len(jax.devices()), list(config.mesh.axes))
        specs = [MeshSpec(dcn=None, **shape) for shape in shapes[: _MAX_MESHES - 2]]
    return [spec.build(devices=_take_devices(spec)) for spec in specs]


def _take_devices(spec: MeshSpec) -> list[Any]:
    return jax.devices() if -1 in spec.axes.values() else jax.devices()[: spec.size]


def _find_error(mesh: Mesh, factory: Any) -> ShardingError | None:
    """Why the step does not compile for a mesh; None if it does."""
    try:
        factory(mesh)
    except ShardingError as error:
        return error
    return None


def _describe(mesh: Mesh) -> str:
    return f"({', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())})"
