"""The hardware table: peak rates, memory and links of one JAX device, each with its source.

Rates are what the makers publish for dense products, not what a program reaches. Links are one
way: a ring over an axis of a TPU torus uses both directions, so it moves twice this per axis.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from .._core.errors import MeshError, Problem, ReportError, did_you_mean, format_problems, raise_all

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device, as JAX counts devices.

    Attributes:
      name: as targets name it: `v5p`, `h100`.
      kind: `"tpu"`, `"gpu"`, or `"cpu"` for a machine that was measured.
      runtime_names: beginnings of what the runtime calls it, lower case.
      flops: peak FLOP/s of dense products by dtype (`bf16`, `int8`, `fp8`, `f32`).
      memory: bytes of HBM.
      memory_bandwidth: bytes/s of HBM.
      clock: Hz of the clock that the TPU compiler's estimated cycles count; None for GPUs.
      link: bytes/s, one way: per torus axis and direction of a TPU, per GPU inside an NVLink
        domain.
      torus_dims: dims of the TPU torus or mesh; 0 for GPUs.
      domain: devices joined by the fast network without limit of shape: GPUs of an NVLink
        domain; None for TPUs, whose slices are what was rented.
      network: bytes/s per device of the network between hosts (TPU: between slices).
      latency: seconds of one hop of the fast network, as an order of magnitude.
      sources: figure → where it is from, by the names above and below.
      tile: rows and columns of the unit that multiplies matrices, which products fill up to.

    >>> Chip("mine", "gpu", (), {"bf16": -1.0}, 0, 1e12, None, 1e11, 0, 8, 1e10, 1e-6, {})
    Traceback (most recent call last):
      ...
    shardkit._core.errors.MeshError: Chip 'mine' cannot be.
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

    def __post_init__(self) -> None:
        """Refuses rates and sizes of nothing, and kinds whose links nobody knows."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        numbers |= {} if self.clock is None else {"clock": self.clock}
        problems = [
            Problem(name, f"{value!r} is not above 0")
            for name, value in sorted(numbers.items())
            if not value > 0
        ]
        if "bf16" not in self.flops:
            why = "has no bf16, which stands for every dtype that is not listed"
            problems.append(Problem(f"flops={dict(self.flops)!r}", why))
        if self.kind not in KINDS:
            problems.append(Problem(f"kind={self.kind!r}", f"is none of {', '.join(KINDS)}"))
        if (self.kind == "tpu") != bool(self.torus_dims):
            why = f"a {self.kind} has a torus" if self.torus_dims else "a tpu has 2 or 3 dims"
            problems.append(Problem(f"torus_dims={self.torus_dims!r}", why))
        fix = "what its data sheet says, in FLOP/s, bytes, bytes/s and seconds"
        raise_all(MeshError, f"Chip {self.name!r} cannot be.", problems, fix)

    def rate(self, axes: int) -> float:
        """Bytes/s that a device sends over so many mesh axes of the fast network at once.

        On a torus each mesh axis is taken to ride a ring of its own, both ways round.

        >>> CHIPS["v5e"].rate(1) / CHIPS["v5e"].link, CHIPS["h100"].rate(1) / CHIPS["h100"].link
        (2.0, 1.0)
        """
        return self.link * (2 * min(axes, self.torus_dims) if self.torus_dims else 1)


KINDS = ("tpu", "gpu", "cpu")
_NUMBERS = ("memory", "memory_bandwidth", "link", "network", "latency")


_BOOK = "jax-ml.github.io/scaling-book/tpus"
_CLOUD = "docs.cloud.google.com/tpu/docs/{}"
_GUESS = "an order of magnitude of ours: makers publish none"
_MEMORY_SPEC = "openxla/xla: xla/backends/gpu/target_config/specs/{}.txtpb"


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
            "flops": _CLOUD.format(name),
            "memory": _CLOUD.format(name),
            "memory_bandwidth": _CLOUD.format(name),
            "clock": f"peak ÷ (cores × MXUs × size² × 2), MXUs from {_BOOK}",
            "link": f"{_BOOK}: ICI, one way per link",
            "torus_dims": _CLOUD.format(name),
            "network": f"{_BOOK}: 25 GB/s per host of {per_host} devices",
            "latency": _GUESS,
            "tile": f"{_BOOK}: size of an MXU",
        },
        tile=tile,
    )


def _gpu(
    name: str,
    runtime_names: tuple[str, ...],
    teraflops: Mapping[str, float],
    memory: int,
    bandwidth: float,
    link: float,
    network: float,
    spec: str,
    sheet: str,
    system: str,
) -> Chip:
    return Chip(
        name=name,
        kind="gpu",
        runtime_names=runtime_names,
        flops={dtype: rate * TERA for dtype, rate in teraflops.items()},
        memory=memory,
        memory_bandwidth=bandwidth * GB,
        clock=None,
        link=link * GB,
        torus_dims=0,
        domain=8,
        network=network * GB,
        latency=2e-6,
        sources={
            "flops": f"{sheet}: dense, half of what it gives with sparsity",
            "memory": _MEMORY_SPEC.format(spec),
            "memory_bandwidth": _MEMORY_SPEC.format(spec),
            "link": f"{sheet}: NVLink, half of both ways",
            "domain": system,
            "network": f"{system}: one {round(network * 8)} Gb/s adapter per GPU",
            "latency": _GUESS,
        },
    )


_TABLE = (
    _tpu("v4", ("tpu v4",), {"bf16": 275, "int8": 275}, 32, 1228, (8, 128), 45, 3, per_host=4),
    _tpu(
        "v5e",
        ("tpu v5 lite", "tpu v5e"),
        {"bf16": 197, "int8": 394},
        16,
        819,
        (4, 128),
        50,
        2,
        per_host=8,
    ),
    _tpu(
        "v5p",
        ("tpu v5p", "tpu v5"),
        {"bf16": 459, "int8": 918},
        95,
        2765,
        (8, 128),
        100,
        3,
        per_host=4,
    ),
    _tpu(
        "v6e",
        ("tpu v6 lite", "tpu v6e"),
        {"bf16": 918, "int8": 1836},
        32,
        1640,
        (4, 256),
        100,
        2,
        per_host=8,
    ),
    # Half a chip: each of its two chiplets is a device. Its docs give 1200 GB/s of links per
    # chip, both ways over six links.
    _tpu(
        "tpu7x",
        ("tpu7x", "tpu v7x"),
        {"bf16": 2307 / 2, "fp8": 4614 / 2},
        96,
        7380 / 2,
        (4, 256),
        100 / 2,
        3,
        per_host=8,
    ),
    _gpu(
        "a100",
        ("nvidia a100-sxm4-80gb",),
        {"bf16": 312, "int8": 624, "f32": 19.5},
        85_100_068_864,
        2039,
        300,
        25,
        "a100_sxm_80",
        "nvidia.com: A100 80GB SXM data sheet",
        "nvidia.com: DGX A100 data sheet",
    ),
    _gpu(
        "h100",
        ("nvidia h100 80gb hbm3",),
        {"bf16": 989, "fp8": 1979, "f32": 67},
        84_942_979_072,
        3352,
        450,
        50,
        "h100_sxm",
        "nvidia.com: H100 SXM data sheet",
        "nvidia.com: DGX H100 data sheet",
    ),
    _gpu(
        "h200",
        ("nvidia h200",),
        {"bf16": 989, "fp8": 1979, "f32": 67},
        151_397_597_184,
        4800,
        450,
        50,
        "h200",
        "nvidia.com: H200 SXM data sheet",
        "nvidia.com: DGX H200 data sheet",
    ),
    _gpu(
        "b200",
        ("nvidia b200",),
        {"bf16": 2250, "fp8": 4500, "f32": 75},
        191_514_411_008,
        7672,
        900,
        50,
        "b200",
        "nvidia.com: DGX B200 data sheet, per GPU",
        "nvidia.com: DGX B200 data sheet",
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}
"""Every known chip by the name that targets use."""


def known_chips(more: Iterable[Chip] = ()) -> dict[str, Chip]:
    """The table, with chips of a user's own, which may replace listed ones."""
    return {**CHIPS, **{chip.name: chip for chip in more}}


def find_chip(name: str, more: Iterable[Chip] = ()) -> Chip:
    """Finds a chip by its name.

    Raises:
      ReportError: there is none; with the nearest name and how to add one.

    >>> find_chip("h100").memory_bandwidth
    3352000000000
    """
    known = known_chips(more)
    if name in known:
        return known[name]
    why = f"is not in the hardware table.{did_you_mean(name, known)}"
    fix = f"one of {', '.join(known)}; or hardware=(sk.Chip(name={name!r}, ...),) in the config"
    raise ReportError(format_problems("There is no such chip.", [Problem(repr(name), why)], fix))


def chip_of(device_kind: str) -> Chip | None:
    """Finds a chip by what the runtime calls a device; None for a device that is not listed.

    >>> chip_of("TPU v5 lite").name, chip_of("NVIDIA H100 80GB HBM3").name, chip_of("cpu")
    ('v5e', 'h100', None)
    """
    text = device_kind.lower()
    found = [
        (len(name), chip) for chip in _TABLE for name in chip.runtime_names if text.startswith(name)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None
