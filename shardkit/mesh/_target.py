"""What a step is compiled for, as text: `local`, `cpu:8`, `tpu:v5p:4x4x4`, `gpu:h100:1x8`."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from .._core.errors import MeshError, did_you_mean
from ..hardware import CHIPS, Chip, known_chips

_EXAMPLES = "local, cpu:8, tpu:v5p:4x4x4, tpu:v5e:16x16:2, gpu:h100:1x8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, present or not.

    Attributes:
      kind: `local`, `cpu`, `tpu` or `gpu`.
      chip: name of a chip in the hardware table; "" for `local` and `cpu`.
      shape: TPU: chips of one slice along each dim of its torus; GPU: hosts, and GPUs per host;
        CPU: number of devices.
      slices: number of TPU slices, or of groups of GPU hosts, joined by the slower network.

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
    def parse(cls, text: str, chips: Iterable[Chip] = ()) -> "Target":
        """Reads a target.

        Args:
          text: `local`; `cpu:<devices>`; `tpu:<generation>:<chips>x<chips>[x<chips>]` with
            `:<slices>` behind it for several slices, or `<slices>x ` before the generation;
            `gpu:<kind>:<hosts>x<gpus>` or `gpu:<kind>:<slices>x<hosts>x<gpus>`.
          chips: chips of a user's own, beside those of the hardware table.

        Returns:
          The target.

        Raises:
          MeshError: the text is none of these, or names an unknown chip.
        """
        tpus, gpus = _split_chips(chips)
        kind, *rest = text.split(":")
        # `tpu:2x v5e:16x16` is another spelling of `tpu:v5e:16x16:2`.
        if kind == "tpu" and len(rest) == 2 and (pair := re.fullmatch(r"(\d+)x *(\w+)", rest[0])):
            rest = [pair[2], rest[1], pair[1]]
        if kind == "local" and not rest:
            return cls("local")
        if kind == "cpu" and len(rest) == 1 and (shape := _parse_numbers(rest[0], 1, 1)):
            return cls("cpu", shape=shape)
        if kind == "tpu" and len(rest) in (2, 3) and rest[0] in tpus:
            shape = _parse_numbers(rest[1], tpus[rest[0]], tpus[rest[0]])
            slices = _parse_numbers(rest[2], 1, 1) if len(rest) == 3 else (1,)
            if shape and slices:
                return cls("tpu", rest[0], shape, slices[0])
        if kind == "gpu" and len(rest) == 2 and rest[0] in gpus:
            if shape := _parse_numbers(rest[1], 2, 3):
                return cls("gpu", rest[0], shape[-2:], shape[0] if len(shape) == 3 else 1)
        why, fix = _explain_fault(text, kind, rest, tpus, gpus)
        raise MeshError.of("No such target.", repr(text), why, fix)

    @property
    def n_devices(self) -> int | None:
        """Number of JAX devices; None for `local`. Some TPU chips are two devices each."""
        per_chip = CHIPS[self.chip].devices_per_chip if self.chip in CHIPS else 1
        return None if self.kind == "local" else math.prod(self.shape) * self.slices * per_chip

    @property
    def topology(self) -> str:
        """The name of one slice, as the TPU compiler takes it: `v5p:4x4x4`."""
        return f"{self.chip}:{_join(self.shape)}"

    def __str__(self) -> str:
        several = self.slices > 1
        if self.kind == "gpu":
            shape = (self.slices, *self.shape) if several else self.shape
            return f"gpu:{self.chip}:{_join(shape)}"
        parts = [self.kind, self.chip, _join(self.shape), str(self.slices) if several else ""]
        return ":".join(filter(None, parts))


def _split_chips(chips: Iterable[Chip]) -> tuple[dict[str, int], list[str]]:
    """Returns `{TPU: dims of its torus}` and the GPUs of the table and of a user's own chips."""
    known = known_chips(chips).values()
    tpus = {chip.name: chip.torus_dims for chip in known if chip.torus_dims}
    return tpus, [chip.name for chip in known if not chip.torus_dims]


def _parse_numbers(text: str, least: int, most: int) -> tuple[int, ...]:
    """Reads `4x4x4`; () unless it is between `least` and `most` positive numbers."""
    is_shape = re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", text)
    numbers = tuple(int(n) for n in text.split("x")) if is_shape else ()
    return numbers if least <= len(numbers) <= most and all(numbers) else ()


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _explain_fault(
    text: str, kind: str, rest: list[str], tpus: Mapping[str, int], gpus: list[str]
) -> tuple[str, str]:
    """Returns why a target cannot be read, and the fix."""
    if kind in tpus or kind in gpus:
        family = "tpu" if kind in tpus else "gpu"
        return f"{kind!r} is a chip; a target starts with tpu or gpu", f"{family}:{text}"
    if kind == "local":
        return (
            "the target local has no options: it is all devices of this machine",
            "local or cpu:8",
        )
    if kind == "cpu":
        return "the number of CPU devices is missing", "cpu:8"
    if kind not in ("tpu", "gpu"):
        kinds = ("local", "cpu", "tpu", "gpu")
        return f"unknown kind of target {kind!r}.{did_you_mean(kind, kinds)}", _EXAMPLES
    chips = list(tpus) if kind == "tpu" else gpus
    chip = rest[0] if rest else ""
    if chip not in chips:
        known = f"known: {', '.join(chips)}."
        return f"unknown chip {chip!r}; {known}{did_you_mean(chip, chips)}", _EXAMPLES
    if kind == "gpu":
        fix = f"gpu:{chip}:1x8, or gpu:{chip}:2x4x8 in 2 slices"
        return "a GPU target has a shape <hosts>x<GPUs per host>", fix
    return f"a slice of {chip} has {tpus[chip]} dims of chips", format_example(chip, tpus[chip])


def format_example(chip: str, dims: int) -> str:
    """Returns targets of a TPU generation, as a fix: `tpu:v5e:4x4, or tpu:v5e:4x4:2 …`."""
    slice_ = f"tpu:{chip}:{_join((4,) * dims)}"
    return f"{slice_}, or {slice_}:2 for 2 slices"
