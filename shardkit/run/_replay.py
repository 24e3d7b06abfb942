"""A step that failed, made again from its dump, and where it went wrong."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import leaves_by_path, short_type
from ..guards import Dump, Origin, first_nonfinite, read_dump
from ..step import CompiledStep


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a step that failed gives when it is made again.

    Attributes:
      dump: what it was made from.
      metrics: now.
      batch: `{leaf: number of its elements that are not finite}`; finite leaves are not in it.
      params: the same of the parameters that it began with.
      gradients: the same of what it made.
      origin: the first operation that made something not finite of finite operands, if any did.
    """

    dump: Dump
    metrics: Mapping[str, float]
    batch: Mapping[str, int]
    params: Mapping[str, int]
    gradients: Mapping[str, int]
    origin: Origin | None

    @property
    def reproduced(self) -> bool:
        """Whether loss or gradients are not finite again."""
        return not all(math.isfinite(self.metrics[name]) for name in ("loss", "grad_norm"))

    def __str__(self) -> str:
        """Returns a few lines for people."""
        now = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        then = ", ".join(f"{name} {value}" for name, value in self.dump.values.items())
        where = str(self.origin) if self.origin else "in what the step began with"
        return "\n".join(
            [
                f"step {self.dump.step} in the run  {then}",
                f"step {self.dump.step} again       {now}",
                f"batch                {_listed(self.batch)}",
                f"parameters           {_listed(self.params)}",
                f"gradients            {_listed(self.gradients)}",
                f"not finite first     {where if self.reproduced else 'nowhere'}",
            ]
        )


def replay(folder: str | Path, step: CompiledStep) -> Replay:
    """Makes a step again that was not finite, without an update.

        one = jax.devices()[:1]
        step = step.replace(mesh=sk.MeshSpec(data=1).build(devices=one))
        print(sk.replay("runs/mine/dumps/step-00000007", step))

    Args:
      folder: a dump, which a run leaves whose step was compiled with `on_nonfinite="stop"`; or
        the run, whose newest one is taken.
      step: the same declaration, for any mesh; one device names its operations best.

    Raises:
      CheckpointError: there is no dump, or it is of another model.
    """
    to = {"state": step.shardings, "batch": step.batch_shardings}
    dump = read_dump(Path(folder), step.abstract_state, step.layout.batch, to)
    metrics, gradients = step.gradients(dump.state, dump.batch)
    args = jax.tree.leaves((dump.state, dump.batch))
    return Replay(
        dump,
        {name: float(value) for name, value in metrics.items()},
        _bad(dump.batch),
        _bad(dump.state.params),
        _bad(gradients),
        first_nonfinite(step.gradient_program.jaxpr, args),
    )


def abstract_batch(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a dump, as far as it is a dict of arrays, from the leaves of its manifest."""
    return {
        path.removeprefix("batch/"): jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
        for path, leaf in leaves.items()
        if path.startswith("batch/")
    }


def _bad(tree: Any) -> dict[str, int]:
    counts = {
        f"{path or '(root)'} {short_type(x.shape, x.dtype)}": int(np.sum(~jnp.isfinite(x)))
        for path, x in leaves_by_path(tree).items()
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    return {leaf: count for leaf, count in counts.items() if count}


def _listed(bad: Mapping[str, int]) -> str:
    if not bad:
        return "finite"
    leaf, count = next(iter(bad.items()))
    more = f", and {len(bad) - 1} leaves more" if len(bad) > 1 else ""
    return f"{leaf}: {count} not finite{more}"
