"""The hardware table: peak rates, memory and links of one JAX device, each with its source.

A new chip is one entry of `_TPUS`, or of `_GPUS` and of `_gpu_target`, for its compiler.

Rates are those that makers publish for dense products, not those that a program reaches. Links
are one way: a ring over an axis of a TPU torus uses both directions, so it moves twice as much.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from .._core.errors import MeshError, Problem, ReportError, did_you_mean, raise_all
from .._core.options import check_options
from ._gpu_target import GPU_TARGETS

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of JAX device.

    Attributes:
      name: its name in targets: `v5p`, `h100`.
      kind: `"tpu"`, `"gpu"`, or `"cpu"` for a machine that was measured.
      runtime_names: prefixes of `jax.Device.device_kind`, lower case.
      flops: peak FLOP/s of dense products by dtype (`bf16`, `int8`, `fp8`, `f32`).
      memory: bytes of HBM.
      memory_bandwidth: bytes/s of HBM.
      clock: Hz of the clock in which the TPU compiler estimates cycles; None for GPUs.
      link: bytes/s, one way: per torus axis and direction of a TPU, per GPU inside an NVLink
        domain.
      torus_dims: dims of the TPU torus or mesh; 0 for GPUs.
      domain: number of GPUs of an NVLink domain; None for TPUs, whose target gives the slice.
      network: bytes/s per device of the network between hosts (TPU: between slices).
      latency: seconds of one hop of the fast network, as an order of magnitude.
      sources: name of a figure → where it is from.
      tile: rows and columns of the matrix unit; products are padded to multiples of it.
      devices_per_chip: number of JAX devices of one chip; TPU targets count chips.
      topology_options: options that the TPU compiler needs to describe an absent slice.

    >>> Chip("mine", "gpu", (), {"bf16": -1.0}, 0, 1e12, None, 1e11, 0, 8, 1e10, 1e-6, {})
    Traceback (most recent call last):
      ...
    shardkit._core.errors.MeshError: Chip 'mine' has impossible figures.
      flops['bf16']  -1.0 is not above 0
      memory         0 is not above 0
    Fix: what its data sheet says, in FLOP/s, bytes, bytes/s and seconds
    """

    name: str
    kind: str
    runtime_names: tuple[str, ...]
    flops: Mapping[str, float]
    memory: int
    memory_bandwidth: float
    clock: float | None
    link: float
    torus_dims: int
    domain: int | None
    network: float
    latency: float
    sources: Mapping[str, str]
    tile: int = 1
    devices_per_chip: int = 1
    topology_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses rates and sizes of 0 or less, and unknown kinds."""
        headline = f"Chip {self.name!r} has impossible figures."
        check_options(self, MeshError, headline, "Chip.")
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        numbers |= {} if self.clock is None else {"clock": self.clock}
        problems = [
            Problem(name, f"{value!r} is not above 0")
            for name, value in sorted(numbers.items())
            if not value > 0
        ]
        if "bf16" not in self.flops:
            why = "has no bf16, the rate of every dtype that is not listed"
            problems.append(Problem(f"flops={dict(self.flops)!r}", why))
        if self.kind not in KINDS:
            problems.append(Problem(f"kind={self.kind!r}", f"is not one of {', '.join(KINDS)}"))
        if (self.kind == "tpu") != bool(self.torus_dims):
            why = f"a {self.kind} has a torus" if self.torus_dims else "a tpu has 2 or 3 dims"
            problems.append(Problem(f"torus_dims={self.torus_dims!r}", why))
        fix = "what its data sheet says, in FLOP/s, bytes, bytes/s and seconds"
        raise_all(MeshError, headline, problems, fix)

    def rate(self, axes: int) -> float:
        """Returns the bytes/s that a device sends over a number of mesh axes at once.

        On a torus each mesh axis is assumed to be a ring of its own, used in both directions.

        >>> CHIPS["v5e"].rate(1) / CHIPS["v5e"].link, CHIPS["h100"].rate(1) / CHIPS["h100"].link
        (2.0, 1.0)
        """
        return self.link * (2 * min(axes, self.torus_dims) if self.torus_dims else 1)


KINDS = ("tpu", "gpu", "cpu")
_NUMBERS = ("memory", "memory_bandwidth", "link", "network", "latency")


_BOOK = "jax-ml.github.io/scaling-book/tpus"
_GUESS = "our estimate of the order of magnitude: makers publish none"


def _tpu(
    name: str,
    runtime_names: tuple[str, ...],
    teraflops: Mapping[str, float],
    memory: int,
    bandwidth: float,
    mxu: tuple[int, int],
    link: float,
    torus_dims: int,
    per_host: int,
) -> Chip:
    flops = {dtype: rate * TERA for dtype, rate in teraflops.items()}
    number, tile = mxu
    documented = ("flops", "memory", "memory_bandwidth", "torus_dims")
    return Chip(
        name=name,
        kind="tpu",
        runtime_names=runtime_names,
        flops=flops,
        memory=memory * GIB,
        memory_bandwidth=bandwidth * GB,
        clock=flops["bf16"] / (2 * number * tile**2),
        link=link * GB,
        torus_dims=torus_dims,
        domain=None,
        network=25 * GB / per_host,
        latency=1e-6,
        sources={
            **dict.fromkeys(documented, f"docs.cloud.google.com/tpu/docs/{name}"),
            "clock": f"peak ÷ (cores × MXUs × size² × 2), MXUs from {_BOOK}",
            "link": f"{_BOOK}: ICI, one way per link",
            "network": f"{_BOOK}: 25 GB/s per host of {per_host} devices",
            "latency": _GUESS,
            "tile": f"{_BOOK}: size of an MXU",
        },
        tile=tile,
        **_OPTIONS.get(name, {}),
    )


def _gpu(
    name: str,
    teraflops: Mapping[str, float],
    *,
    link: float,
    network: float,
    spec: str,
    sheet: str,
    runtime: str = "",
) -> Chip:
    target, system = GPU_TARGETS[name], f"nvidia.com: DGX {name.upper()} data sheet"
    public = f"openxla/xla: xla/backends/gpu/target_config/specs/{spec}.txtpb"
    return Chip(
        name=name,
        kind="gpu",
        runtime_names=(runtime or target.description.lower(),),
        flops={dtype: rate * TERA for dtype, rate in teraflops.items()},
        memory=target.memory,
        memory_bandwidth=target.bandwidth,
        clock=None,
        link=link * GB,
        torus_dims=0,
        domain=8,
        network=network * GB,
        latency=2e-6,
        sources={
            "flops": f"nvidia.com: {sheet}: dense, half of what it gives with sparsity",
            **dict.fromkeys(("memory", "memory_bandwidth"), public),
            "link": f"nvidia.com: {sheet}: NVLink, half of both ways",
            "domain": system,
            "network": f"{system}: one {round(network * 8)} Gb/s adapter per GPU",
            "latency": _GUESS,
        },
    )


# Name, what the runtime calls it, TFLOP/s; GiB and GB/s of memory; matrix units and their size;
# GB/s of a link, dims of the torus, devices of a host.
_TPUS = (
    ("v4", ("tpu v4",), {"bf16": 275, "int8": 275}, 32, 1228, (8, 128), 45, 3, 4),
    ("v5e", ("tpu v5 lite", "tpu v5e"), {"bf16": 197, "int8": 394}, 16, 819, (4, 128), 50, 2, 8),
    ("v5p", ("tpu v5p", "tpu v5"), {"bf16": 459, "int8": 918}, 95, 2765, (8, 128), 100, 3, 4),
    ("v6e", ("tpu v6 lite", "tpu v6e"), {"bf16": 918, "int8": 1836}, 32, 1640, (4, 256), 100, 2, 8),
    # Each of the two chiplets of a chip is a device, so these are half the figures of a chip. Its
    # docs give 1200 GB/s of links per chip, both ways over six links.
    ("tpu7x", ("tpu7x", "tpu v7x"), {"bf16": 1153.5, "fp8": 2307}, 96, 3690, (4, 256), 50, 3, 8),
)
_OPTIONS: Mapping[str, Any] = {
    # By default the compiler shows a v4 chip as two devices; its runtime shows one.
    "v4": {"topology_options": {"chip_config_name": "megacore"}},
    "tpu7x": {"devices_per_chip": 2},
}
_A100 = {"bf16": 312, "int8": 624, "f32": 19.5}
_H100 = {"bf16": 989, "fp8": 1979, "f32": 67}
_B200 = {"bf16": 2250, "fp8": 4500, "f32": 75}
_GPUS = (
    _gpu("a100", _A100, link=300, network=25, spec="a100_sxm_80", sheet="A100 80GB SXM data sheet"),
    _gpu("h100", _H100, link=450, network=50, spec="h100_sxm", sheet="H100 SXM data sheet"),
    _gpu(
        "h200",
        _H100,
        link=450,
        network=50,
        spec="h200",
        sheet="H200 SXM data sheet",
        runtime="nvidia h200",
    ),
    _gpu("b200", _B200, link=900, network=50, spec="b200", sheet="DGX B200 data sheet, per GPU"),
)
_TABLE = (*(_tpu(*row) for row in _TPUS), *_GPUS)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}
"""Every known chip by the name that targets use."""


def known_chips(more: Iterable[Chip] = ()) -> dict[str, Chip]:
    """Returns the table with chips of a user's own, which replace those of the same name."""
    return {**CHIPS, **{chip.name: chip for chip in more}}


def find_chip(name: str, more: Iterable[Chip] = ()) -> Chip:
    """Finds a chip by its name.

    Args:
      name: of the chip.
      more: chips of a user's own.

    Raises:
      ReportError: there is no such chip; names the nearest one and how to declare it.

    >>> find_chip("h100").memory_bandwidth
    3352320000000
    """
    known = known_chips(more)
    if name in known:
        return known[name]
    why = f"is not in the hardware table.{did_you_mean(name, known)}"
    fix = f"one of {', '.join(known)}; or hardware=(sk.Chip(name={name!r}, ...),) in the config"
    raise ReportError.of("Unknown chip.", repr(name), why, fix)


def identify_chip(device_kind: str) -> Chip | None:
    """Finds a chip by `jax.Device.device_kind`; None for a device that is not in the table.

    >>> identify_chip("TPU v5 lite").name, identify_chip("cpu")
    ('v5e', None)
    """
    text = device_kind.lower()
    names = [(name, chip) for chip in _TABLE for name in chip.runtime_names]
    fitting = [(len(name), chip) for name, chip in names if text.startswith(name)]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None
