"""The hardware table against what the compilers are told, and against its own sources."""

import dataclasses
import re
from pathlib import Path

import pytest

from shardkit._core.errors import MeshError, ReportError
from shardkit.cli import main
from shardkit.hardware import (
    CHIPS,
    find_chip,
    gpu_target_config,
    hardware_table,
    identify_chip,
    measure_cpu,
)
from shardkit.mesh import Target

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
GPUS = ("a100", "h100", "h200", "b200")
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
    assert identify_chip(described) is chip


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
        far = {"torus_dims", "clock", "tile"} if chip.torus_dims else {"domain"}
        near = {"flops", "memory", "memory_bandwidth", "link", "network", "latency"}
        assert chip.sources.keys() == near | far


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
    assert identify_chip(kind) is CHIPS[name]


def test_unknown_devices_are_not_guessed():
    assert identify_chip("cpu") is None
    assert identify_chip("NVIDIA GeForce RTX 4090") is None
    # Cards of a known name with other memory, clocks and links.
    assert identify_chip("NVIDIA A100-SXM4-40GB") is None
    assert identify_chip("NVIDIA H100 PCIe") is None


def mine(**changes):
    return dataclasses.replace(CHIPS["v5e"], name="mine", runtime_names=(), **changes)


def test_every_figure_of_the_table_is_printed_with_its_source():
    text = hardware_table(list(CHIPS.values()))
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for name, chip in CHIPS.items():
        assert f" {name} " in flat
        assert all(source in flat for source in chip.sources.values())
    (row,) = [line.split() for line in text.splitlines() if line.startswith("h100 ")]
    # Told by a spec, not by the data sheet, which rounds it.
    bandwidth = re.search(r"memory, memory bandwidth: (\S+ \S+h100_sxm\.txtpb)", flat)
    assert bandwidth[1] == CHIPS["h100"].sources["memory_bandwidth"]
    assert row == ["h100", "989", "1979", "67", "79.1", "3352", "450", "8", "GPUs", "50", "2"]


def test_a_chip_that_cannot_be_is_refused_with_all_that_is_wrong():
    with pytest.raises(MeshError, match="Chip 'mine'") as error:
        mine(memory=0, flops={"f32": -1.0}, torus_dims=0, kind="npu")
    for words in (
        "memory",
        "flops['f32']         -1.0 is not above 0",
        "has no bf16",
        "is not one of tpu",
    ):
        assert words in str(error.value)
    assert "Fix: what its data sheet says" in str(error.value)


def test_an_unknown_chip_is_named_with_the_nearest():
    with pytest.raises(ReportError, match=r"'h10'  is not in .*Did you mean 'h100'\?") as error:
        find_chip("h10")
    assert "hardware=(sk.Chip(name='h10'" in str(error.value)
    assert find_chip("mine", [mine()]).name == "mine"


def test_targets_may_name_chips_of_a_users_own():
    own = [
        dataclasses.replace(CHIPS["v5e"], name="mine"),
        dataclasses.replace(CHIPS["h100"], name="card"),
    ]
    assert Target.parse("tpu:mine:4x4", own).n_devices == 16
    assert Target.parse("gpu:card:2x8", own).n_devices == 16
    with pytest.raises(MeshError, match=r"unknown chip 'min'; known: .*Did you mean 'mine'\?"):
        Target.parse("tpu:min:4x4", own)
    with pytest.raises(MeshError, match="a slice of mine has 2 dims of chips"):
        Target.parse("tpu:mine:4x4x4", own)


def test_this_machine_is_measured_and_says_so():
    chip = measure_cpu()
    assert (chip.kind, chip.name) == ("cpu", "cpu")
    assert chip.flops["f32"] > 1e8
    assert 1e7 < chip.link < chip.memory_bandwidth < 1e13
    assert "measured on" in chip.sources["flops"]


CONFIG = """
import dataclasses
from shardkit.config import Config
from shardkit.hardware import CHIPS

def config():
    slow = dataclasses.replace(CHIPS["v5e"], name="mine", link=1e8, sources={"link": "my wires"})
    return Config(hardware=(slow,))
"""


def test_commands_know_the_chips_of_a_config(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    assert main(["hardware", "mine", "h100", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    assert "my wires" in said
    assert "v5e" not in said
    assert main(["hardware", "v5ee"]) == 2
    assert "Did you mean 'v5e'?" in capsys.readouterr().err
    assert main(["plan", str(path), "--target", "tpu:mine:2x4"]) == 2
    assert "mine is the config's own chip, which no compiler knows" in capsys.readouterr().err
    assert main(["report", str(path), "--chip", "min"]) == 2
    assert "'min'  is not in the hardware table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)]
)
def test_clocks_that_follow_from_peaks_are_the_ones_known(name, gigahertz):
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=0.01)
