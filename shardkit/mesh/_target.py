"""What a step is compiled for, as text: `local`, `cpu:8`, `tpu:v5p:4x4x4`, `gpu:h100:1x8`."""

import dataclasses
import math
import re
from collections.abc import Mapping

from .._core.errors import MeshError, Problem, did_you_mean, format_problems

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
"""Known TPU generations, with the number of dims of their torus or mesh of chips."""

GPUS = ("a100", "h100", "h200", "b200")
"""Known GPU kinds."""

_EXAMPLES = "local, cpu:8, tpu:v5p:4x4x4, tpu:v5e:16x16:2, gpu:h100:1x8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, present or not.

    Attributes:
      kind: `local`, `cpu`, `tpu` or `gpu`.
      chip: TPU generation or GPU kind; "" for `local` and `cpu`.
      shape: chips of one TPU slice; hosts and GPUs per host; or the number of CPU devices.
      slices: TPU slices, or groups of GPU hosts, joined by the slower network.

    >>> Target.parse("tpu:v5e:16x16:2")
    Target(kind='tpu', chip='v5e', shape=(16, 16), slices=2)
    >>> Target.parse("gpu:h100:1x8").n_devices, str(Target.parse("gpu:h100:2x4x8"))
    (8, 'gpu:h100:2x4x8')
    """

    kind: str
    chip: str = ""
    shape: tuple[int, ...] = ()
    slices: int = 1

    @classmethod
    def parse(cls, text: str, more: Mapping[str, int] | None = None) -> "Target":
        """Reads a target.

        Args:
          text: `local`; `cpu:<devices>`; `tpu:<generation>:<chips>x<chips>[x<chips>]` with
            `:<slices>` behind it for several slices, or `<slices>x ` before the generation;
            `gpu:<kind>:<hosts>x<gpus>` or `gpu:<kind>:<slices>x<hosts>x<gpus>`.
          more: chips beside the known ones, each with the dims of its torus; 0 for a GPU.

        Returns:
          The target.

        Raises:
          MeshError: the text is none of these, or names an unknown chip.
        """
        own = more or {}
        tpus = {**TPUS, **{name: dims for name, dims in own.items() if dims}}
        gpus = (*GPUS, *(name for name, dims in own.items() if not dims))
        kind, *rest = text.split(":")
        # `tpu:2x v5e:16x16`, as one says it, is `tpu:v5e:16x16:2`.
        if kind == "tpu" and len(rest) == 2 and (said := re.fullmatch(r"(\d+)x *(\w+)", rest[0])):
            rest = [said[2], rest[1], said[1]]
        if kind == "local" and not rest:
            return cls("local")
        if kind == "cpu" and len(rest) == 1 and (shape := _numbers(rest[0], 1, 1)):
            return cls("cpu", shape=shape)
        if kind == "tpu" and len(rest) in (2, 3) and rest[0] in tpus:
            shape = _numbers(rest[1], tpus[rest[0]], tpus[rest[0]])
            slices = _numbers(rest[2], 1, 1) if len(rest) == 3 else (1,)
            if shape and slices:
                return cls("tpu", rest[0], shape, slices[0])
        if kind == "gpu" and len(rest) == 2 and rest[0] in gpus:
            if shape := _numbers(rest[1], 2, 3):
                return cls("gpu", rest[0], shape[-2:], shape[0] if len(shape) == 3 else 1)
        why, fix = _fault(text, kind, rest, tpus, gpus)
        raise MeshError(format_problems("No such target.", [Problem(repr(text), why)], fix))

    @property
    def n_devices(self) -> int | None:
        """Number of JAX devices; None for `local`. A `tpu7x` chip shows as two devices."""
        per_chip = 2 if self.chip == "tpu7x" else 1
        return None if self.kind == "local" else math.prod(self.shape) * self.slices * per_chip

    @property
    def topology(self) -> str:
        """The name of one slice, as the TPU compiler takes it: `v5p:4x4x4`."""
        return f"{self.chip}:{_joined(self.shape)}"

    def __str__(self) -> str:
        several = self.slices > 1
        if self.kind == "gpu":
            shape = (self.slices, *self.shape) if several else self.shape
            return f"gpu:{self.chip}:{_joined(shape)}"
        parts = [self.kind, self.chip, _joined(self.shape), str(self.slices) if several else ""]
        return ":".join(filter(None, parts))


def _numbers(text: str, least: int, most: int) -> tuple[int, ...]:
    """Reads `4x4x4`; () unless it is between `least` and `most` positive numbers."""
    numbers = tuple(int(n) for n in text.split("x")) if re.fullmatch(r"\d+(x\d+)*", text) else ()
    return numbers if least <= len(numbers) <= most and all(numbers) else ()


def _joined(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _fault(
    text: str, kind: str, rest: list[str], tpus: Mapping[str, int], gpus: tuple[str, ...]
) -> tuple[str, str]:
    """Returns what is wrong with a target that cannot be read, and the fix."""
    if kind in tpus or kind in gpus:
        family = "tpu" if kind in tpus else "gpu"
        return f"{kind!r} is a chip; a target starts with its kind", f"{family}:{text}"
    if kind == "local":
        return "the local devices are what they are", "local, or cpu:8"
    if kind == "cpu":
        return "a number of CPU devices is wanted", "cpu:8"
    if kind not in ("tpu", "gpu"):
        kinds = ("local", "cpu", "tpu", "gpu")
        return f"unknown kind of target {kind!r}.{did_you_mean(kind, kinds)}", _EXAMPLES
    chips = tuple(tpus) if kind == "tpu" else gpus
    chip = rest[0] if rest else ""
    if chip not in chips:
        known = f"known: {', '.join(chips)}."
        return f"unknown chip {chip!r}; {known}{did_you_mean(chip, chips)}", _EXAMPLES
    if kind == "gpu":
        return (
            "hosts x GPUs per host are wanted",
            f"gpu:{chip}:1x8, or gpu:{chip}:2x4x8 in 2 slices",
        )
    return f"a slice of {chip} has {tpus[chip]} dims of chips", example(chip, tpus[chip])


def example(chip: str, dims: int) -> str:
    """Returns targets of a TPU generation that exist."""
    one = f"tpu:{chip}:{_joined((4,) * dims)}"
    return f"{one}, or {one}:2 for 2 slices"
