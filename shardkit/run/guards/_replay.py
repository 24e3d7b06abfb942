"""Replays a step that failed from its dump, and finds where it went wrong."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.errors import CheckpointError
from ..._core.io._files import local_path
from ..._core.tree import leaves_by_path, short_type
from ...step import CompiledStep
from ._dump import Dump, read_dump
from ._origin import Origin, first_nonfinite


@dataclasses.dataclass(frozen=True)
class Replay:
    """Result of replaying a step that failed.

    Attributes:
      dump: its input.
      metrics: of the replay.
      batch: `{leaf: number of elements that are not finite}`, without finite leaves.
      params: the same of the parameters before the step.
      gradients: the same of the gradients.
      origin: the first operation with finite operands and a result that is not, if any.
    """

    dump: Dump
    metrics: Mapping[str, float]
    batch: Mapping[str, int]
    params: Mapping[str, int]
    gradients: Mapping[str, int]
    origin: Origin | None

    @property
    def reproduced(self) -> bool:
        """Whether the loss or the gradient norm is not finite again."""
        return not all(math.isfinite(self.metrics[name]) for name in ("loss", "grad_norm"))

    def __str__(self) -> str:
        """Returns a summary of six lines."""
        replayed = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        original = ", ".join(f"{name} {value}" for name, value in self.dump.values.items())
        where = str(self.origin) if self.origin else "in the input of the step"
        return "\n".join(
            [
                f"step {self.dump.step} in the run  {original}",
                f"step {self.dump.step} replayed    {replayed}",
                f"batch                {_summarize(self.batch)}",
                f"parameters           {_summarize(self.params)}",
                f"gradients            {_summarize(self.gradients)}",
                f"not finite first     {where if self.reproduced else 'nowhere'}",
            ]
        )


def replay(folder: str | Path, step: CompiledStep) -> Replay:
    """Replays a step whose loss or gradients were not finite, without an update.

        mesh = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
        print(sk.replay("runs/mine/dumps/step-00000007", step.replace(mesh=mesh)))

    Args:
      folder: a dump, which a run writes if its step was compiled with `on_nonfinite="stop"`; or
        the folder of the run, for its newest dump.
      step: the same declaration, on any mesh; on one device it names operations best.

    Raises:
      CheckpointError: the folder has no dump, or the dump is of another model.
    """
    shardings = {"state": step.shardings, "batch": step.batch_shardings}
    dump = read_dump(
        local_path(folder, CheckpointError), step.abstract_state, step.layout.batch, shardings
    )
    metrics, gradients = step.gradients(dump.state, dump.batch)
    args = jax.tree.leaves((dump.state, dump.batch))
    return Replay(
        dump=dump,
        metrics={name: float(value) for name, value in metrics.items()},
        batch=_count_nonfinite(dump.batch),
        params=_count_nonfinite(dump.state.params),
        gradients=_count_nonfinite(gradients),
        origin=first_nonfinite(step.gradient_program.jaxpr, args),
    )


def abstract_batch(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract batch of a dump, a dict of arrays, from the leaves of its manifest."""
    return {
        path.removeprefix("batch/"): jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
        for path, leaf in leaves.items()
        if path.startswith("batch/")
    }


def _count_nonfinite(tree: Any) -> dict[str, int]:
    counts = {
        f"{path or '(root)'} {short_type(x.shape, x.dtype)}": int(np.sum(~jnp.isfinite(x)))
        for path, x in leaves_by_path(tree).items()
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    return {leaf: count for leaf, count in counts.items() if count}


def _summarize(bad: Mapping[str, int]) -> str:
    if not bad:
        return "finite"
    leaf, count = next(iter(bad.items()))
    others = f", and {len(bad) - 1} more leaves" if len(bad) > 1 else ""
    return f"{leaf}: {count} not finite{others}"
