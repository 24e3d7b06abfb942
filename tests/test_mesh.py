"""Meshes: sizes, layouts, targets; and what each mistake says."""

import itertools
import math
import pickle
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from shardkit._core.errors import MeshError
from shardkit.mesh import MeshSpec, Target, mesh_shapes, target_devices
from shardkit.mesh._build import arrange_devices


def ids(mesh):
    return np.vectorize(lambda d: d.id)(mesh.devices)


def message(action):
    with pytest.raises(MeshError) as error:
        action()
    return str(error.value)


def test_devices_in_the_place_of_the_target_are_named():
    with pytest.raises(MeshError, match=r"(?s)target  is a list, not a text.*build\(devices="):
        MeshSpec(data=1).build(jax.devices()[:1])


def test_sizes_are_in_declared_order_and_axis_types_are_auto():
    mesh = MeshSpec(tensor=4, data=2).build()
    assert dict(mesh.shape) == {"tensor": 4, "data": 2}
    assert mesh.axis_names == ("tensor", "data")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize("target", [None, "local", "cpu:8", Target("cpu", shape=(8,))])
def test_simulated_devices_are_row_major(target):
    np.testing.assert_array_equal(
        ids(MeshSpec(data=2, tensor=-1).build(target)), [[0, 1, 2, 3], [4, 5, 6, 7]]
    )


def test_given_devices_keep_their_order():
    devices = jax.devices()[:4][::-1]
    np.testing.assert_array_equal(
        ids(MeshSpec(data=2, tensor=2).build(devices=devices)), [[3, 2], [1, 0]]
    )


def test_cpu_target_takes_the_first_devices():
    assert ids(MeshSpec(data=-1).build("cpu:3")).tolist() == [0, 1, 2]


def test_slices_of_simulated_devices_are_contiguous_blocks():
    mesh = MeshSpec(data=2, tensor=2, dcn={"data": 2}).build()
    assert dict(mesh.shape) == {"data": 4, "tensor": 2}
    assert ids(mesh).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    inner = MeshSpec(data=2, tensor=2, dcn={"tensor": 2}).build()
    assert dict(inner.shape) == {"data": 2, "tensor": 4}
    # Slice 0 is devices 0-3: its 2x2 block stands left of slice 1's.
    assert ids(inner).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


class FakeDevice:
    """A device of a machine that is not here: enough for a mesh's layout."""

    def __init__(self, id, process_index=0, slice_index=None, platform="gpu"):
        self.id, self.process_index, self.platform = id, process_index, platform
        self.device_kind = "fake"
        if slice_index is not None:
            self.slice_index = slice_index

    def __repr__(self):
        return f"fake({self.id})"


def test_slices_follow_the_devices_that_know_them():
    # Interleaved on purpose: contiguous blocks would mix the slices.
    devices = [FakeDevice(i, process_index=i % 4, slice_index=i % 2) for i in range(8)]
    mesh = arrange_devices(devices, {"data": 1, "tensor": 4}, {"data": 2}, as_given=False)
    assert [{d.slice_index for d in row} for row in mesh.devices] == [{0}, {1}]


def test_without_slices_a_process_is_the_unit():
    devices = [FakeDevice(i, process_index=i % 2) for i in range(8)]
    mesh = arrange_devices(devices, {"data": 2, "tensor": 2}, {"data": 2}, as_given=False)
    rows = [{d.process_index for d in row} for row in mesh.devices]
    assert rows == [{0}, {0}, {1}, {1}]


def test_dcn_that_disagrees_with_the_slices_is_an_error():
    devices = [FakeDevice(i, slice_index=i // 4) for i in range(8)]
    text = message(lambda: arrange_devices(devices, {"data": 2}, {"data": 4}, as_given=False))
    assert "dcn={'data': 4}  needs 4 slices, the devices form 2 slices" in text
    assert "Fix: dcn sizes with product 2" in text


def test_slices_that_no_axis_crosses_are_an_error():
    devices = [FakeDevice(i, platform="tpu", slice_index=i // 4) for i in range(8)]
    text = message(lambda: arrange_devices(devices, {"data": 4, "tensor": 2}, {}, as_given=False))
    assert "2 slices  dcn names no axis that crosses them" in text
    assert "Fix: MeshSpec(data=2, tensor=2, dcn={'data': 2})" in text


def test_specs_are_values():
    spec = MeshSpec(data=2, tensor=-1, dcn={"data": 2})
    same = MeshSpec(data=2, tensor=-1, dcn={"data": 2})
    assert spec == same
    assert len({spec, same, MeshSpec(tensor=-1, data=2, dcn={"data": 2})}) == 2
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.axes == {"data": 2, "tensor": -1}
    assert spec.dcn == {"data": 2}
    assert str(spec) == "data=2, tensor=-1, dcn={'data': 2}"
    assert eval(repr(spec)) == spec
    with pytest.raises(AttributeError, match="cannot assign"):
        spec.sizes = ()


def test_size_and_shape_include_slices():
    spec = MeshSpec(data=2, tensor=4, dcn={"data": 4})
    assert spec.shape == spec.resolve(32) == {"data": 8, "tensor": 4}
    assert spec.size == 32
    assert MeshSpec(data=-1, tensor=4, dcn={"data": 4}).resolve(32) == spec.shape


def test_with_axes_replaces_sizes_and_keeps_order():
    spec = MeshSpec(data=2, tensor=4, dcn={"data": 2}).with_axes(data=4, tensor=2)
    assert spec == MeshSpec(data=4, tensor=2, dcn={"data": 2})


@given(st.integers(1, 24), st.integers(1, 3))
@settings(database=None, max_examples=40)
def test_mesh_shapes_are_all_factorizations(n, n_axes):
    found = [tuple(shape.values()) for shape in mesh_shapes(n, ["a", "b", "c"][:n_axes])]
    tried = itertools.product(range(n, 0, -1), repeat=n_axes)
    assert found == [sizes for sizes in tried if math.prod(sizes) == n]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
@settings(database=None, max_examples=100)
def test_resolve_uses_every_device_or_says_so(data, tensor, n):
    for spec in (MeshSpec(data=data, tensor=tensor), MeshSpec(data=data, tensor=-1)):
        fits = n == data * tensor if -1 not in spec.axes.values() else n % data == 0
        if fits:
            assert math.prod(spec.resolve(n).values()) == n
        else:
            assert "does not fit" in message(lambda spec=spec: spec.resolve(n))


def test_too_few_devices():
    text = message(MeshSpec(data=4, model=4).build)
    assert "The mesh does not fit 8 devices." in text
    assert "MeshSpec(data=4, model=4)  needs 16 devices, 8 present (cpu)" in text
    assert "meshes that fit 8 (data x model): 8x1, 4x2, 2x4, 1x8" in text
    assert "sk.simulate_devices(16) before JAX starts" in text


def test_idle_devices_are_declared_never_implied():
    text = message(MeshSpec(data=2, model=2).build)
    assert "MeshSpec(data=2, model=2)  uses 4 of 8 devices, 8 present (cpu)" in text
    assert "MeshSpec(data=-1, model=2)" in text
    assert "build(devices=jax.devices()[:4]) to leave the others idle" in text
    assert MeshSpec(data=2, model=2).build(devices=jax.devices()[:4]).size == 4


def test_quotient_that_is_not_whole():
    text = message(MeshSpec(data=3, model=-1).build)
    assert "model=-1 would be 8 / 3, not a whole number; 8 present (cpu)" in text
    assert "8x1, 4x2, 2x4, 1x8" in text


def test_slices_that_do_not_divide_the_devices():
    text = message(MeshSpec(data=-1, dcn={"data": 3}).build)
    assert "dcn sizes whose product divides 8, not 3" in text


def test_no_devices():
    assert "0 present (none)" in message(lambda: MeshSpec(data=2).build(devices=[]))


def test_every_mistake_of_a_declaration_is_in_one_error():
    text = message(
        lambda: MeshSpec(data=0, tensor=-1, pipe=-1, expert=True, dcn={"dat": 2, "pipe": -1})
    )
    assert "data=0" in text
    assert "0 is not a positive int or -1" in text
    assert "expert=True" in text
    assert "tensor=-1, pipe=-1  only one size may be -1" in text
    assert "give tensor or pipe a size" in text
    assert "the mesh has axes data, tensor, pipe, expert. Did you mean 'data'?" in text
    assert "-1 is not a positive number of slices" in text


@pytest.mark.parametrize("size", [-2, 1.5, "2", None])
def test_sizes_are_positive_ints(size):
    assert f"data={size!r}" in message(lambda: MeshSpec(data=size))


@pytest.mark.parametrize("name", ["", "a b", "2x"])
def test_axis_names_are_identifiers(name):
    assert f"axis {name!r}" in message(lambda: MeshSpec(**{name: 2}))


def test_a_mesh_has_an_axis():
    assert "has no axis" in message(MeshSpec)


def test_shape_is_unknown_while_a_size_is_open():
    assert "tensor=-1 depends on the number of devices" in message(
        lambda: MeshSpec(data=2, tensor=-1).shape
    )


def test_with_axes_knows_no_other_axis():
    text = message(lambda: MeshSpec(data=2, tensor=4).with_axes(tensr=2))
    assert "tensr=2  the mesh has axes data, tensor. Did you mean 'tensor'?" in text


def test_target_and_devices_exclude_each_other():
    text = message(lambda: MeshSpec(data=-1).build("cpu:8", devices=jax.devices()))
    assert "both choose the devices" in text


def test_slices_may_be_said_first():
    for text in ("tpu:2x v5e:16x16", "tpu:2xv5e:16x16"):
        assert str(Target.parse(text)) == "tpu:v5e:16x16:2"


@pytest.mark.parametrize(
    ("text", "target", "n_devices"),
    [
        ("local", Target("local"), None),
        ("cpu:512", Target("cpu", shape=(512,)), 512),
        ("tpu:v5p:4x4x4", Target("tpu", "v5p", (4, 4, 4)), 64),
        ("tpu:v5e:16x16:2", Target("tpu", "v5e", (16, 16), 2), 512),
        ("tpu:tpu7x:4x4x4", Target("tpu", "tpu7x", (4, 4, 4)), 128),
        ("gpu:h100:1x8", Target("gpu", "h100", (1, 8)), 8),
        ("gpu:b200:2x4x8", Target("gpu", "b200", (4, 8), 2), 64),
    ],
)
def test_targets_read_and_print(text, target, n_devices):
    assert Target.parse(text) == target
    assert str(target) == text
    assert target.n_devices == n_devices


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        ("cup:8", "unknown kind of target 'cup'. Did you mean 'cpu'?", "local, cpu:8, tpu:"),
        ("cpu", "number of CPU devices", "cpu:8"),
        ("cpu:0", "number of CPU devices", "cpu:8"),
        ("local:8", "local has no options", "cpu:8"),
        ("v5p:4x4x4", "'v5p' is a chip", "tpu:v5p:4x4x4"),
        ("tpu:v5pp:4x4x4", "known: v4, v5e, v5p, v6e, tpu7x. Did you mean 'v5p'?", "tpu:v5p"),
        ("tpu:v5e:4x4x4", "a slice of v5e has 2 dims of chips", "tpu:v5e:4x4"),
        ("gpu:h1000:1x8", "known: a100, h100, h200, b200. Did you mean 'h100'?", "gpu:h100"),
        ("gpu:h100:8", "<hosts>x<GPUs per host>", "gpu:h100:1x8"),
    ],
)
def test_targets_that_do_not_exist(text, why, fix):
    found = message(lambda: MeshSpec(data=-1).build(text))
    assert repr(text) in found
    assert why in found
    assert fix in found.split("Fix: ")[1]


def test_more_cpu_devices_than_there_are():
    text = message(lambda: MeshSpec(data=-1).build("cpu:16"))
    assert "cpu:16  the target has 16 CPU devices, this process has 8" in text
    assert "Fix: sk.simulate_devices(16) right after the imports" in text


def test_absent_gpus_name_the_command():
    text = message(lambda: target_devices(Target.parse("gpu:h100:1x8")))
    assert "shardkit report CONFIG --target gpu:h100:1x8" in text


def test_absent_tpu_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = message(lambda: target_devices(Target.parse("tpu:v5p:4x4x4")))
    assert re.search(r"libtpu.* is not installed", text)
    assert 'pip install "shardkit[tpu]"' in text
