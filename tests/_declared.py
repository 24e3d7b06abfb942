"""Steps of research code, good and bad, as `module:function` for a child process."""

import os
import time
from typing import NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

WIDTH, BATCH = 256, 128

Declared = tuple[sk.StepSpec, sk.MeshSpec]


def step(axis: str = "tensor") -> Declared:
    """A linear model split over `tensor`."""

    def init(key):
        return {"w": jax.random.normal(key, (WIDTH, WIDTH))}

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    spec = sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)},
        strategy=sk.Strategy(params=sk.PathRules({"w": P(None, axis)}), batch=P("data")),
    )
    return spec, sk.MeshSpec(data=-1, tensor=2)


def zero() -> Declared:
    """The same model whole on every device, its update split by ZeRO-2."""
    spec, _ = step()
    changed = spec.replace(optimizer=optax.adam(0.1), strategy=sk.strategies.zero(stage=2))
    return changed, sk.MeshSpec(data=-1)


def misspelt() -> Declared:
    """Names an axis that the mesh does not have."""
    return step("tensr")


def number() -> int:
    """Does not return a step."""
    return 3


def crash() -> NoReturn:
    """Aborts the process, as a segfault of the compiler does."""
    print("before the crash", flush=True)
    os.abort()


def simulating() -> Declared:
    """Sets its own number of devices, as a script does at its top."""
    sk.simulate_devices(3)
    return step()


def needy(width: int) -> Declared:
    """Has a required argument."""
    raise AssertionError(width)


def bug() -> NoReturn:
    """Raises an exception of its own."""
    raise KeyError("mine")


def forever() -> NoReturn:
    """Never returns, and neither does its child process."""
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    time.sleep(600)
    raise AssertionError
