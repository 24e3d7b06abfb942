"""The declaration of a mesh: named sizes, as data; and the shapes that fit a number of devices."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from .._core.errors import MeshError, Problem, count, did_you_mean, format_problems, raise_all
from .._core.io._notebook import notebook_html
from .._core.io._table import Column, Table
from .._core.options import check_arguments
from ._build import arrange_devices, check_devices, target_devices
from ._target import Target


def mesh_shapes(n_devices: int, axes: Sequence[str]) -> list[dict[str, int]]:
    """Lists every mesh of these axes that uses exactly `n_devices`, first axis largest first.

    >>> mesh_shapes(4, ["data", "tensor"])
    [{'data': 4, 'tensor': 1}, {'data': 2, 'tensor': 2}, {'data': 1, 'tensor': 4}]
    """
    if not axes:
        return [{}] if n_devices == 1 else []
    first, *rest = axes
    sizes = [n for n in range(n_devices, 0, -1) if n_devices % n == 0]
    return [{first: n, **shape} for n in sizes for shape in mesh_shapes(n_devices // n, rest)]


def format_fitting_shapes(n_devices: int, near: Mapping[str, int], most: int = 8) -> str:
    """Returns `8x1, 4x2, 2x4, 1x8`: the few shapes that are nearest to sizes that do not fit.

    >>> format_fitting_shapes(8, {"data": 4, "model": 4})
    '8x1, 4x2, 2x4, 1x8'
    """
    shapes = mesh_shapes(n_devices, list(near))

    def distance(shape: Mapping[str, int]) -> float:
        return sum(abs(math.log(size / max(1, near[axis]))) for axis, size in shape.items())

    nearest = sorted(shapes, key=distance)[:most]
    text = ", ".join("x".join(map(str, s.values())) for s in shapes if s in nearest)
    omitted = len(shapes) - len(nearest)
    return f"{text} and {omitted} more" if omitted else text


_RESERVED = ("dcn",)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class MeshSpec:
    """Named sizes of a device mesh. Nothing touches a device before `build`.

    The order of the names is the order of the mesh's axes; put last what communicates most.
    One size may be -1: the number of devices divided by the other sizes. `dcn` gives the number
    of slices or hosts that an axis crosses: `MeshSpec(data=2, tensor=4, dcn={"data": 4})` has
    `data` = 4 slices x 2 within each = 8, and uses 32 devices.

    Attributes:
      sizes: `(axis, size within a slice)` in mesh order; also as the dict `axes`.
      slices: `(axis, number of slices)` for the axes that cross slices; also as `dcn`.

    >>> spec = MeshSpec(data=2, tensor=-1)
    >>> str(spec), spec.resolve(8)
    ('data=2, tensor=-1', {'data': 2, 'tensor': 4})
    >>> MeshSpec(data=2, tensor=4, dcn={"data": 4}).shape
    {'data': 8, 'tensor': 4}
    """

    sizes: tuple[tuple[str, int], ...]
    slices: tuple[tuple[str, int], ...]

    def __init__(self, *, dcn: Mapping[str, int] | None = None, **sizes: int) -> None:
        """Declares a mesh and checks its sizes.

        Args:
          dcn: number of slices along an axis (or hosts, if the fast network ends at a host). The
            size of the axis in the built mesh is this times its own.
          **sizes: size of each axis within a slice; one may be -1.

        Raises:
          MeshError: a name or size is not legal; lists all of them.
        """
        headline = "The mesh cannot be declared."
        check_arguments(MeshError, headline, dcn=(dcn, Mapping[str, int] | None))
        slices = dict(dcn or {})
        raise_all(MeshError, headline, _find_problems(sizes, slices))
        object.__setattr__(self, "sizes", tuple(sizes.items()))
        object.__setattr__(self, "slices", tuple((a, slices[a]) for a in sizes if a in slices))

    @property
    def axes(self) -> dict[str, int]:
        """Size of each axis within a slice, in mesh order, as declared."""
        return dict(self.sizes)

    @property
    def dcn(self) -> dict[str, int]:
        """Number of slices along each axis that crosses slices."""
        return dict(self.slices)

    @property
    def shape(self) -> dict[str, int]:
        """Size of each axis of the built mesh, slices included, as `jax.sharding.Mesh.shape`.

        Raises:
          MeshError: a size is -1 and depends on the devices.
        """
        if open_axes := [axis for axis, size in self.sizes if size == -1]:
            why = f"{open_axes[0]}=-1 depends on the number of devices"
            fix = f"give {open_axes[0]} a size, or build() the mesh"
            raise MeshError.of("The mesh has no sizes yet.", repr(self), why, fix)
        return {axis: size * self.dcn.get(axis, 1) for axis, size in self.sizes}

    @property
    def size(self) -> int:
        """Number of devices.

        Raises:
          MeshError: a size is -1.
        """
        return math.prod(self.shape.values())

    def with_axes(self, **sizes: int) -> "MeshSpec":
        """Returns a copy with other sizes for some of its axes.

        Args:
          **sizes: new size within a slice, by axis.

        Raises:
          MeshError: an axis is not in this mesh, or a size is not legal.
        """
        problems = [
            Problem(
                f"{axis}={size!r}",
                f"the mesh has axes {', '.join(self.axes)}.{did_you_mean(axis, self.axes)}",
                "MeshSpec(...) declares new axes",
            )
            for axis, size in sizes.items()
            if axis not in self.axes
        ]
        raise_all(MeshError, "The mesh has no such axis.", problems)
        return MeshSpec(dcn=self.dcn, **{**self.axes, **sizes})

    def resolve(self, n_devices: int) -> dict[str, int]:
        """Returns the size of each axis, slices included, on a number of devices.

        Args:
          n_devices: number of devices, all of which the mesh must use.

        Raises:
          MeshError: the sizes do not multiply to that number.
        """
        return self._resolve_sizes(n_devices, f"{count(n_devices, 'device')} present").shape

    def build(
        self, target: str | Target | None = None, *, devices: Sequence[Any] | None = None
    ) -> Mesh:
        """Builds the mesh, always with Auto axis types.

        Real devices are ordered by their network, with `jax.experimental.mesh_utils`. Simulated
        devices and those passed as `devices` keep their order: row-major, with contiguous blocks
        of them as the slices of `dcn`.

        Args:
          target: None or `"local"` for all devices of this machine; `"cpu:8"` for the first 8
            CPU devices; `"tpu:v5p:4x4x4"` to compile for TPUs that are absent.
          devices: exactly these devices, in this order, instead of a target.

        Returns:
          The mesh, axes in declared order.

        Raises:
          MeshError: the sizes do not multiply to the number of devices, `dcn` differs from their
            slices or processes, or the devices are not available.
        """
        if target is not None and devices is not None:
            problem = Problem(f"build({str(target)!r}, devices=[...])", "both choose the devices")
            raise MeshError(
                format_problems("The devices are given twice.", [problem], "give one of them")
            )
        if not isinstance(target, str | Target | None):
            why = f"is a {type(target).__name__}, not a text such as 'cpu:8'"
            fix = "build(devices=[...]) for devices"
            raise MeshError.of("This is no target.", "target", why, fix)
        parsed = Target.parse(target) if isinstance(target, str) else target or Target("local")
        chosen = target_devices(parsed) if devices is None else check_devices(devices)
        platforms = ", ".join(sorted({device.platform for device in chosen})) or "none"
        spec = self._resolve_sizes(len(chosen), f"{len(chosen)} present ({platforms})")
        return arrange_devices(chosen, spec.axes, spec.dcn, as_given=devices is not None)

    def _resolve_sizes(self, n_devices: int, present: str) -> "MeshSpec":
        """Returns a copy without -1 that uses exactly `n_devices`."""
        fixed = math.prod(size for _, size in self.sizes if size != -1)
        known = fixed * math.prod(slices for _, slices in self.slices)
        open_axes = [axis for axis, size in self.sizes if size == -1]
        if n_devices and n_devices % known == 0:
            if open_axes:
                return self.with_axes(**{open_axes[0]: n_devices // known})
            if n_devices == known:
                return self
        why, fixes = self._explain_misfit(n_devices, known, open_axes, present)
        headline = f"The mesh does not fit {count(n_devices, 'device')}."
        raise MeshError.of(headline, repr(self), why, "; or ".join(fixes))

    def _explain_misfit(
        self, n_devices: int, known: int, open_axes: list[str], present: str
    ) -> tuple[str, list[str]]:
        """Returns why the sizes do not multiply to `n_devices`, and the fixes."""
        fixes = []
        slices = math.prod(self.dcn.values())
        if n_devices and n_devices % slices == 0:
            per_slice = n_devices // slices
            each = f" in each of {slices} slices" if slices > 1 else ""
            near = {axis: max(1, size) for axis, size in self.sizes}
            shapes = format_fitting_shapes(per_slice, near)
            fixes.append(f"meshes that fit {per_slice}{each} ({' x '.join(near)}): {shapes}")
        else:
            fixes.append(f"dcn sizes whose product divides {n_devices}, not {slices}")
        if open_axes:
            return (
                f"{open_axes[0]}=-1 would be {n_devices} / {known}, not a whole number; {present}",
                fixes,
            )
        fits = (a for a, s in self.sizes if n_devices and n_devices % (known // s) == 0)
        if axis := next(fits, ""):
            fixes.append(f"{self.with_axes(**{axis: -1})!r}")
        if known > n_devices:
            fixes.append(f"sk.simulate_devices({known}) before JAX starts, for a dry run")
            return f"needs {count(known, 'device')}, {present}", fixes
        fixes.append(f"build(devices=jax.devices()[:{known}]) to leave the others idle")
        return f"uses {known} of {count(n_devices, 'device')}, {present}", fixes

    def __str__(self) -> str:
        rows = [f"{axis}={size}" for axis, size in self.sizes]
        return ", ".join(rows + ([f"dcn={self.dcn}"] if self.slices else []))

    def __repr__(self) -> str:
        return f"MeshSpec({self})"

    def _repr_html_(self) -> str:
        """Each axis with its size, and the number of slices that it crosses."""
        slices = self.dcn
        rows = [(axis, str(size), str(slices.get(axis, 1))) for axis, size in self.sizes]
        numbers = (Column("devices in a slice", right=True), Column("slices", right=True))
        return notebook_html(repr(self), Table(["axis", *numbers], rows))


def _find_problems(sizes: Mapping[str, Any], slices: Mapping[str, Any]) -> list[Problem]:
    """Lists every name and size that is not legal, whatever the devices."""
    problems = []
    if not sizes:
        problems.append(Problem("MeshSpec()", "has no axis", "MeshSpec(data=-1)"))
    for axis, size in sizes.items():
        if not axis.isidentifier() or axis in _RESERVED:
            why = "the name of an axis must be a Python identifier"
            named = re.sub(r"\W+", "_", f"axis_{axis}" if not axis[:1].isalpha() else axis)
            named = f"{named}_" if named in _RESERVED else named
            problems.append(Problem(f"axis {axis!r}", why, f"MeshSpec({named}={size!r})"))
        if not _is_size(size) and size != -1:
            why = f"{size!r} is not a positive int or -1 (the remaining devices)"
            problems.append(Problem(f"{axis}={size!r}", why, f"{axis}=2, or {axis}=-1"))
    if len(open_axes := [axis for axis, size in sizes.items() if size == -1]) > 1:
        shown = ", ".join(f"{axis}=-1" for axis in open_axes)
        fix = f"give {' or '.join(open_axes)} a size"
        problems.append(Problem(shown, "only one size may be -1", fix))
    for axis, size in slices.items():
        subject = f"dcn={{{axis!r}: {size!r}}}"
        if axis not in sizes:
            why = f"the mesh has axes {', '.join(sizes)}.{did_you_mean(axis, sizes)}"
            problems.append(Problem(subject, why, f"one of {', '.join(map(repr, sizes))}"))
        if not _is_size(size):
            why = f"{size!r} is not a positive number of slices"
            problems.append(Problem(subject, why, f"dcn={{{axis!r}: 2}}"))
    return problems


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
