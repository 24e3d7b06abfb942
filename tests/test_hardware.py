"""The hardware table against what the compilers are told, and against its own sources."""

import re
from pathlib import Path

import pytest

from shardkit.hardware import CHIPS, chip_of, gpu_target_config
from shardkit.mesh._target import GPUS, TPUS

GOLDEN = Path(__file__).parent / "data" / "gpu_targets.txt"


def golden() -> dict[str, str]:
    pieces = re.split(r"^# (\w+)\n", GOLDEN.read_text(), flags=re.M)[1:]
    return {name: text.rstrip("\n") for name, text in zip(pieces[::2], pieces[1::2], strict=True)}


def figure(text: str, name: str) -> float:
    (found,) = re.findall(rf"^ *{name}: ([\d.]+)$", text, re.M)
    return float(found)


@pytest.mark.parametrize("name", GPUS)
def test_what_the_cuda_compiler_is_told_is_what_was_recorded(name):
    assert gpu_target_config(name) == golden()[name]


@pytest.mark.parametrize("name", GPUS)
def test_target_configs_are_well_formed(name):
    text, depth = gpu_target_config(name), 0
    for token in re.findall(r"[{}]", re.sub(r'"[^"]*"', "", text)):
        depth += 1 if token == "{" else -1
        assert depth >= 0
    assert depth == 0
    for line in text.splitlines():
        assert re.fullmatch(r' *(\w+ \{.*|\}|\w+: ([\d.]+|".*"))', line), line


@pytest.mark.parametrize("name", GPUS)
def test_the_table_agrees_with_the_target_configs(name):
    text, chip = gpu_target_config(name), CHIPS[name]
    assert figure(text, "device_memory_size") == chip.memory
    assert figure(text, "memory_bandwidth") == pytest.approx(chip.memory_bandwidth, rel=1e-3)
    (described,) = re.findall(r'device_description_str: "(.*)"', text)
    assert chip_of(described) is chip


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
@pytest.mark.parametrize(("dtype", "key"), [("bf16", 16), ("fp8", 20)])
def test_published_peaks_follow_from_cores_and_clocks(name, dtype, key):
    """Two FLOPs × cores × units × products per clock × clock."""
    text = gpu_target_config(name)
    matrix = text[text.index("matrix_unit_description") :]
    rate = re.search(
        rf"key: {key} value {{ clock_rate_ghz: ([\d.]+) units_per_core: (\d+) ops_per_clock: (\d+)",
        matrix,
    )
    clock, units, operations = map(float, rate.groups())
    peak = 2e9 * clock * units * operations * figure(text, "core_count")
    assert peak == pytest.approx(CHIPS[name].flops[dtype], rel=0.02)


def test_every_target_is_in_the_table():
    assert set(CHIPS) == {*TPUS, *GPUS}
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.kind == ("tpu" if name in TPUS else "gpu")
        assert chip.torus_dims == TPUS.get(name, 0)
        assert chip.sources


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_chips_by_what_the_runtime_calls_them(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_unknown_devices_are_not_guessed():
    assert chip_of("cpu") is None
    assert chip_of("NVIDIA GeForce RTX 4090") is None
    # Cards of a known name with other memory, clocks and links.
    assert chip_of("NVIDIA A100-SXM4-40GB") is None
    assert chip_of("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize(
    ("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)]
)
def test_clocks_that_follow_from_peaks_are_the_ones_known(name, gigahertz):
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=0.01)
