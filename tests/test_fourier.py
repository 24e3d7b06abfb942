"""Losses with Fourier transforms are right, or refused where XLA would fail on a CPU device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.step._executable_checks import check_transforms

BATCH = {
    "x": np.random.default_rng(0).normal(size=(32, 16)).astype("f"),
    "y": np.ones((32, 4), "f"),
}
HLO = """HloModule jit_run, is_scheduled=true

ENTRY %main (x: c64[2,8,16]) -> c64[2,8,16] {
  %x = c64[2,8,16]{LAYOUT} parameter(0)
  ROOT %fft.1 = c64[2,8,16]{LAYOUT} fft(%x), fft_type=FFT, fft_length={16}, metadata={op_name="fno"}
}
"""


@dataclasses.dataclass
class Compiled:
    text: str

    def as_text(self):
        return self.text


def init(key):
    one, two, three = jax.random.split(key, 3)
    real, imaginary = (jax.random.normal(k, (16, 16)) / 4 for k in (one, two))
    return {"w": jax.lax.complex(real, imaginary), "o": jax.random.normal(three, (16, 4)) / 4}


def loss(params, batch, key):
    """A layer of a Fourier neural operator."""
    frequencies = jnp.fft.fft(batch["x"], axis=-1) @ params["w"]
    return jnp.mean((jnp.fft.ifft(frequencies).real @ params["o"] - batch["y"]) ** 2)


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
@pytest.mark.parametrize("split", [True, False])
def test_a_fourier_layer_is_right_or_refused(split, mode):
    params = sk.first_match(sk.shard_largest("tensor", min_size=16), sk.REPLICATED)
    strategy = sk.Strategy(params=params if split else sk.REPLICATED, batch=P("data"))
    spec = sk.StepSpec(
        loss_fn=loss, optimizer=optax.sgd(0.1), init=init, batch=BATCH, strategy=strategy
    ).replace(accumulate=2, mode=mode)
    try:
        step = spec.compile(sk.MeshSpec(data=2, tensor=2).build(devices=jax.devices()[:4]))
    except sk.errors.StepError:
        assert split
        return
    state = step.init(jax.random.key(0))
    start = jax.tree.map(np.asarray, state.params)
    metrics, grads = step.gradients(state, BATCH)
    value, wanted = jax.value_and_grad(loss)(start, BATCH, None)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for name, want in wanted.items():
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-5)


def test_a_transform_in_another_layout_is_named():
    mesh = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
    check_transforms(Compiled(HLO.replace("LAYOUT", "2,1,0")), mesh)
    with pytest.raises(sk.errors.StepError) as caught:
        check_transforms(Compiled(HLO.replace("LAYOUT", "1,0,2")), mesh)
    assert "fno  is laid out as c64[2,8,16]{1,0,2}, which XLA runs on no CPU" in str(caught.value)
    assert "Fix:" in str(caught.value)
