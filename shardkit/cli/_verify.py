"""`shardkit verify`: the config's step on one device and on several meshes."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from .._core.errors import Problem, ShardingError, VerificationError, format_problems
from .._core.io._console import make_console
from ..config import Config, apply_overrides
from ..mesh import MeshSpec, mesh_shapes
from ..parity import verify
from ..testing import kill_matrix
from ._source import config_of

# Without CONFIG: a decoder whose heads divide by eight, small enough for two minutes on two cores.
_SMALL = (
    "model=nano",
    "model.num_heads=8",
    "model.kv_heads=8",
    "data.seq_len=32",
    "data.batch_size=16",
)
_DROPOUT = 0.1
_MOST_MESHES = 8


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = make_console(soft_wrap=True)
    if arguments.config is None:
        shown = " ".join(f"--set {one}" for one in _SMALL)
        console.print(f"No CONFIG, so a small run: {shown}")
        arguments.overrides = [*_SMALL, *arguments.overrides]
    config = _proved(config_of(arguments))
    console.print(
        f"Proved in float32, with dropout {config.model.dropout:g} and weights of which one half "
        "of the rows has none.\n"
    )
    most = max(_MOST_MESHES, len(arguments.mesh or ()))
    factory = functools.lru_cache(most + 1)(config.step_spec().compile)
    meshes = [mesh for mesh in _meshes(arguments, config) if _legal(mesh, factory, console)]
    if not meshes:
        problem = Problem("--mesh", "no mesh is legal for this model", _legal_fix(config))
        raise VerificationError(format_problems("There is nothing to verify.", [problem]))
    batches = ragged_batches(config)
    certificate = verify(factory, meshes, batches=batches, steps=arguments.steps)
    console.print(str(certificate))
    if not arguments.mutations:
        return 0 if certificate.ok else 1
    mesh = max(meshes, key=lambda mesh: min(mesh.shape.values()))
    matrix = kill_matrix(factory, mesh, batches=batches, steps=arguments.steps)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    console.print(f"\nMutations on mesh ({shape}):\n{matrix}")
    return 0 if certificate.ok and matrix.ok else 1


def _legal_fix(config: Config) -> str:
    """A mesh over the axes that the config's own strategy uses."""
    return "--mesh " + ",".join(f"{axis}=1" for axis in config.mesh.axes) + ", or other sizes"


def _proved(config: Config) -> Config:
    """The config in float32 and with dropout, whose noise must not depend on the mesh either."""
    model = dataclasses.replace(config.model, dropout=config.model.dropout or _DROPOUT)
    strategy = dataclasses.replace(config.strategy, precision="float32")
    return dataclasses.replace(config, model=model, strategy=strategy)


def ragged_batches(config: Config, n: int = 2) -> list[dict[str, np.ndarray]]:
    """Random tokens; the first half of the rows has no valid one, the rest valid ones at random."""
    rng = np.random.default_rng(config.data.seed)
    shape = (config.data.batch_size, config.data.seq_len)

    def one() -> dict[str, np.ndarray]:
        tokens = rng.integers(0, config.model.vocab, (2, *shape), np.int32)
        weights = (rng.random(shape) < rng.random((shape[0], 1))).astype(np.float32)
        weights[: shape[0] // 2] = 0
        weights[-1] = 1  # however few the rows, one is valid
        made = {"inputs": tokens[0], "targets": tokens[1], "weights": weights}
        if config.data.packing:
            cuts = rng.random(shape) < 4 / shape[1]
            made["segment_ids"] = 1 + np.cumsum(cuts, 1, dtype=np.int32)
        return made

    return [one() for _ in range(n)]


def _meshes(arguments: argparse.Namespace, config: Config) -> list[Mesh]:
    if arguments.mesh:
        specs = [apply_overrides(config, [f"mesh={text}"]).mesh for text in arguments.mesh]
    else:
        shapes = mesh_shapes(len(jax.devices()), list(config.mesh.axes))
        specs = [MeshSpec(dcn=None, **shape) for shape in shapes[:_MOST_MESHES]]
    return [spec.build(devices=_first(spec)) for spec in specs]


def _first(spec: MeshSpec) -> list[Any]:
    return jax.devices() if -1 in spec.axes.values() else jax.devices()[: spec.size]


def _legal(mesh: Mesh, factory: Any, console: Console) -> bool:
    """Compiles the step for a mesh; what it cannot be laid out on is skipped, and said."""
    try:
        factory(mesh)
    except ShardingError as error:
        reason = "\n  ".join(str(error).splitlines())
        console.print(f"Skipped: {reason}\n")
        return False
    return True
