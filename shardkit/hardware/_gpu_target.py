"""`GpuTargetConfigProto` text, from which XLA compiles for a GPU that is absent.

The figures are those of the public specs in openxla/xla, `xla/backends/gpu/target_config/specs`;
limits that all of these GPUs share are written once.
"""

import dataclasses
from collections.abc import Mapping

# XLA primitive types: 2 s8, 6 u8, 10 f16, 11 f32, 12 f64, 16 bf16, 19 f8e5m2, 20 f8e4m3fn,
# 32 f4e2m1fn.
_SCALAR = {10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}


_HOPPER = {2: 1024, 6: 1024, 10: 512, 11: 256, 12: 32, 16: 512, 19: 1024, 20: 1024}
_BLACKWELL = {kind: 2 * operations for kind, operations in _HOPPER.items()} | {12: 16, 32: 4096}
_ACCELERATED = "feature_extension: ACCELERATED_FEATURES"


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """One GPU as its compiler describes it."""

    description: str  # what its driver calls it
    capability: str  # fields of `cuda_compute_capability`
    cores: int  # number of multiprocessors, each with `fpus` units and `shared` bytes of memory
    fpus: int
    shared: int
    bandwidth: int  # bytes/s of its memory
    cache: int  # bytes of the L2 cache
    clock: float  # GHz
    memory: int  # bytes
    matrix_clock: float = 0.0  # GHz of its matrix units
    # primitive type → operations per clock of these; none leaves them and the links out
    matrix: Mapping[int, int] = dataclasses.field(default_factory=dict)


_H100 = GpuTarget(
    "NVIDIA H100 80GB HBM3",
    f"major: 9 {_ACCELERATED}",
    cores=132,
    fpus=128,
    shared=233472,
    bandwidth=3_352_320_000_000,
    cache=52_428_800,
    clock=1.98,
    memory=84_942_979_072,
    matrix_clock=1.8295201,
    matrix=_HOPPER,
)
GPU_TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB",
        "major: 8",
        cores=108,
        fpus=64,
        shared=167936,
        bandwidth=2_039_040_000_000,
        cache=41_943_040,
        clock=1.41,
        memory=85_100_068_864,
    ),
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100,
        description="NVIDIA H200 141GB HBM3e",
        bandwidth=4_800_000_000_000,
        memory=151_397_597_184,
    ),
    "b200": dataclasses.replace(
        _H100,
        description="NVIDIA B200",
        capability=f"major: 10 {_ACCELERATED}",
        cores=148,
        bandwidth=7_672_320_000_000,
        cache=132_644_864,
        clock=1.965,
        memory=191_514_411_008,
        matrix_clock=1.8353101,
        matrix=_BLACKWELL,
    ),
}
"""By the name that targets use."""


def gpu_target_config(name: str) -> str:
    """Returns the `stream_executor.GpuTargetConfigProto` text of a GPU of the hardware table."""
    gpu = GPU_TARGETS[name]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.shared - 1024,  # the driver keeps 1 KiB a block
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    lines.append(f"  cuda_compute_capability {{ {gpu.capability} }}")
    if gpu.matrix:
        scalar = [(kind, gpu.clock, *rate) for kind, rate in _SCALAR.items()]
        matrix = [(kind, gpu.matrix_clock, 4, n) for kind, n in gpu.matrix.items()]
        lines += [_unit("scalar", scalar), _unit("matrix", matrix)]
        lines.append("  device_interconnect_info { active_links: 18 }")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 8 }",
            "runtime_version { major: 13 minor: 0 }",
            f'device_description_str: "{gpu.description}"',
        ]
    )


def _unit(kind: str, rates: list[tuple[int, float, int, int]]) -> str:
    rows = [
        f"    rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units}"
        f" ops_per_clock: {operations} }} }}"
        for key, clock, units, operations in rates
    ]
    return "\n".join([f"  {kind}_unit_description {{", *rows, "  }"])
