"""The cases of a sweep: every factorization of the devices × accumulation × remat."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from .._core.errors import Problem, StepError, SweepError, raise_all
from ..mesh import MeshSpec, mesh_shapes
from ..nn._remat import parse_policy


@dataclasses.dataclass(frozen=True)
class SweepCase:
    """One step of a sweep.

    Attributes:
      mesh: `(axis, size)` in mesh order.
      accumulate: micro-batches per step.
      remat: name of a checkpoint policy.

    >>> case = SweepCase((("data", 4), ("tensor", 1)), accumulate=2)
    >>> case.key, case.shown
    ('data=4,tensor=1 accumulate=2 remat=none', 'data=4')
    """

    mesh: tuple[tuple[str, int], ...]
    accumulate: int = 1
    remat: str = "none"

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → size."""
        return dict(self.mesh)

    @property
    def mesh_spec(self) -> MeshSpec:
        """The mesh, not built."""
        return MeshSpec(dcn=None, **self.sizes)

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def key(self) -> str:
        """The case as one line, unique in a sweep."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh)
        return f"{mesh} accumulate={self.accumulate} remat={self.remat}"

    @property
    def shown(self) -> str:
        """The mesh without the axes that split nothing."""
        split = [f"{axis}={size}" for axis, size in self.mesh if size > 1]
        return ",".join(split) or "one device"


def enumerate_cases(
    devices: Sequence[int], axes: Sequence[str], accumulate: Sequence[int], remat: Sequence[str]
) -> list[SweepCase]:
    """Enumerates a sweep, all cases of one mesh after each other; each uses all of its devices.

    One SweepError lists the options that are empty, repeated, or not valid.
    """
    problems = [*_axis_problems(axes), *_number_problems("devices", devices)]
    problems += [*_number_problems("accumulate", accumulate), *_remat_problems(remat)]
    raise_all(SweepError, "There is nothing to sweep over.", problems)
    return [
        SweepCase(tuple(shape.items()), k, name)
        for n in devices
        for shape in mesh_shapes(n, axes)
        for k, name in itertools.product(accumulate, remat)
    ]


def _axis_problems(axes: Sequence[str]) -> list[Problem]:
    fix = 'axes=("data", "fsdp", "tensor")'
    if isinstance(axes, str) or not axes:
        return [Problem(f"axes={axes!r}", "is not a list of mesh axes", fix)]
    bad = [axis for axis in axes if not str(axis).isidentifier()]
    problems = [Problem(f"axis {axis!r}", "an axis is named by an identifier", fix) for axis in bad]
    twice = sorted({axis for axis in axes if list(axes).count(axis) > 1})
    return problems + [Problem(f"axis {axis!r}", "is named twice", fix) for axis in twice]


def _number_problems(name: str, values: Sequence[Any]) -> list[Problem]:
    bad = [n for n in values if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    fix = f"{name}=(1, 8)"
    problems = [Problem(f"{name}={n!r}", "is not a positive int", fix) for n in bad]
    if not values or len(set(values)) < len(values):
        why = "holds a number twice" if values else "is empty"
        problems.append(Problem(f"{name}={list(values)!r}", why, fix))
    return problems


def _remat_problems(names: Sequence[str]) -> list[Problem]:
    fix = 'remat=("none", "full")'
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        return [Problem(f"remat={names!r}", "is not a list of distinct policies", fix)]
    problems = []
    for name in names:
        try:
            parse_policy(name)
        except StepError as error:
            problems.append(Problem(f"remat={name!r}", str(error).splitlines()[1].strip(), fix))
    return problems
