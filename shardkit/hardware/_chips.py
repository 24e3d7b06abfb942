"""The hardware table: peak rates, memory and links of one JAX device, each with its source.

Rates are what the makers publish for dense products, not what a program reaches. Links are one
way: a ring over an axis of a TPU torus uses both directions, so it moves twice this per axis.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device, as JAX counts devices.

    Attributes:
      name: as targets name it: `v5p`, `h100`.
      kind: `"tpu"` or `"gpu"`.
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
      sources: where the figures are from.
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
    sources: tuple[str, ...]


_BOOK = "jax-ml.github.io/scaling-book/tpus: HBM, FLOP/s, ICI per link, DCN 25 GB/s per host"
_CLOUD = "docs.cloud.google.com/tpu/docs/{}: FLOP/s, HBM capacity and bandwidth"
_CLOCK = "clock = peak FLOP/s ÷ (cores x MXUs x MXU size² x 2), from the scaling book's MXU sizes"


def _tpu(
    name: str,
    runtime_names: tuple[str, ...],
    teraflops: Mapping[str, float],
    memory: int,
    bandwidth: float,
    macs_per_cycle: int,
    link: float,
    torus_dims: int,
    per_host: int,
) -> Chip:
    flops = {dtype: rate * TERA for dtype, rate in teraflops.items()}
    return Chip(
        name=name,
        kind="tpu",
        runtime_names=runtime_names,
        flops=flops,
        memory=memory * GIB,
        memory_bandwidth=bandwidth * GB,
        clock=flops["bf16"] / (2 * macs_per_cycle),
        link=link * GB,
        torus_dims=torus_dims,
        domain=None,
        network=25 * GB / per_host,
        latency=1e-6,
        sources=(_CLOUD.format(name), _BOOK, _CLOCK),
    )


def _gpu(
    name: str,
    runtime_names: tuple[str, ...],
    teraflops: Mapping[str, float],
    memory: int,
    bandwidth: float,
    link: float,
    network: float,
    sheet: str,
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
        sources=(sheet, "openxla/xla xla/backends/gpu/target_config/specs: memory size"),
    )


_MXU_128 = 4 * 128 * 128  # four MXUs of a TensorCore
_MXU_256 = 4 * 256 * 256

_TABLE = (
    _tpu("v4", ("tpu v4",), {"bf16": 275, "int8": 275}, 32, 1228, 2 * _MXU_128, 45, 3, per_host=4),
    _tpu(
        "v5e",
        ("tpu v5 lite", "tpu v5e"),
        {"bf16": 197, "int8": 394},
        16,
        819,
        _MXU_128,
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
        2 * _MXU_128,
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
        _MXU_256,
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
        _MXU_256,
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
        "NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s adapter per GPU",
    ),
    _gpu(
        "h100",
        ("nvidia h100 80gb hbm3",),
        {"bf16": 989, "fp8": 1979, "f32": 67},
        84_942_979_072,
        3352,
        450,
        50,
        "NVIDIA H100 SXM data sheet; DGX H100: one 400 Gb/s adapter per GPU",
    ),
    _gpu(
        "h200",
        ("nvidia h200",),
        {"bf16": 989, "fp8": 1979, "f32": 67},
        151_397_597_184,
        4800,
        450,
        50,
        "NVIDIA H200 SXM data sheet; DGX H200: one 400 Gb/s adapter per GPU",
    ),
    _gpu(
        "b200",
        ("nvidia b200",),
        {"bf16": 2250, "fp8": 4500, "f32": 75},
        191_514_411_008,
        7672,
        900,
        50,
        "NVIDIA DGX B200 data sheet, dense rates; one 400 Gb/s adapter per GPU",
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}
"""Every known chip by the name that targets use."""


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
