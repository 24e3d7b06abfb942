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
    """Returns no step."""
    return 3


def crash() -> NoReturn:
    """Ends the process as a compiler's segfault would."""
    print("before the crash", flush=True)
    os.abort()


def simulating() -> Declared:
    """Asks for devices of its own, as a script does at its top."""
    sk.simulate_devices(3)
    return step()


def needy(width: int) -> Declared:
    """Needs an argument."""
    raise AssertionError(width)


def bug() -> NoReturn:
    """Has a bug of its own."""
    raise KeyError("mine")


def forever() -> NoReturn:
    """Never returns, with a process of its own."""
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    time.sleep(600)
    raise AssertionError
