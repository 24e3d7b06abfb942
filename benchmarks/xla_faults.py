"""Faults of XLA's partitioner in plain JAX: right and wrong layouts side by side.

    python benchmarks/xla_faults.py

Each row is one program on 8 simulated CPU devices: the largest error of a gradient, relative to the
gradient on one device. Rows of one fault differ in one thing only.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RNG = np.random.default_rng(0)
WIDTH = 64


def two_products(batch, sizes=(2, 2, 2), rows=WIDTH):
    """Two square products, weights over (fsdp, tensor), rows over `batch`."""
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    x, y = (RNG.normal(size=(rows, WIDTH)).astype("f") for _ in range(2))
    params = {k: RNG.normal(size=(WIDTH, WIDTH)).astype("f") / 8 for k in "ab"}

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) - y) ** 2)

    weights = dict.fromkeys(params, NamedSharding(mesh, P("fsdp", "tensor")))
    rows_over = NamedSharding(mesh, P(batch))
    gradient = jax.jit(
        jax.grad(loss), in_shardings=(weights, rows_over, rows_over), out_shardings=weights
    )
    return error(gradient(params, x, y), jax.grad(loss)(params, x, y))


def one_product(rows):
    """The product in the backward pass that goes wrong: `x[rows, tensor] · w[fsdp, tensor]`."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    x, w = (RNG.normal(size=(WIDTH, WIDTH)).astype("f") for _ in range(2))
    over, stored = (NamedSharding(mesh, P(first, "tensor")) for first in (rows, "fsdp"))
    product = jax.jit(lambda x, w: x @ w.T, in_shardings=(over, stored), out_shardings=over)
    moved = "collective-permute(" in product.lower(x, w).compile().as_text()
    return f"{error(product(x, w), x @ w.T):.1e}{', rows moved' if moved else ''}"


def vmapped_convolution(kernel, devices=8, rows=32):
    """The weight's gradient of a convolution, one for each part of the rows by `jax.vmap`."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    x = RNG.normal(size=(rows, 8, 8, 4)).astype("f")
    w = RNG.normal(size=(kernel, kernel, 4, 8)).astype("f") / 3

    def loss(w, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.mean(jnp.tanh(y) ** 2)

    parts = x.reshape(8, rows // 8, *x.shape[1:])
    over = NamedSharding(mesh, P("data"))
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    gradient = jax.jit(each, in_shardings=(None, over), out_shardings=over)
    return error(gradient(w, parts), each(w, parts))


def split_images(images):
    """A 3 x 3 convolution of images over `images`, its kernel over fsdp."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    x = RNG.normal(size=(8, 8, 8, 4)).astype("f")
    w = RNG.normal(size=(3, 3, 4, 8)).astype("f") / 4
    dims = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def loss(w, x):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), **dims)
        return jnp.mean(jnp.tanh(y) ** 2)

    stored = NamedSharding(mesh, P(None, None, None, "fsdp"))
    placed = stored, NamedSharding(mesh, P(*images))
    gradient = jax.jit(jax.grad(loss), in_shardings=placed, out_shardings=stored)
    return error(gradient(w, x), jax.grad(loss)(w, x))


def split_window(window):
    """A strided convolution along one dim, its kernel's window over `window`."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    x = RNG.normal(size=(16, 8, 8)).astype("f")
    w = RNG.normal(size=(4, 8, 8)).astype("f") / 4
    dims = {"padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}

    def loss(w, x):
        return jnp.mean(jnp.tanh(jax.lax.conv_general_dilated(x, w, (2,), **dims)) ** 2)

    stored = NamedSharding(mesh, P(window, None, "fsdp"))
    placed = stored, NamedSharding(mesh, P("data"))
    both = jax.grad(loss, argnums=(0, 1))
    gradient = jax.jit(both, in_shardings=placed, out_shardings=placed)
    return error(gradient(w, x), both(w, x))


def grouped_queries(embed):
    """Attention with one key head on activations whose embed dim is over `embed`."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    x = RNG.normal(size=(4, 4, 16)).astype("f")
    shapes = {"q": (16, 4, 4), "k": (16, 4), "o": (4, 4, 16)}
    params = {name: RNG.normal(size=shape).astype("f") / 4 for name, shape in shapes.items()}
    over = NamedSharding(mesh, P(None, "data", embed))

    def loss(params, x, constrain=False):
        x = jax.lax.with_sharding_constraint(x, over) if constrain else x
        q, k = jnp.einsum("bte,ehk->bthk", x, params["q"]), x @ params["k"]
        scores = jax.nn.softmax(jnp.einsum("bthk,bsk->bhts", q, k))
        out = jnp.einsum("bhts,bsk->bthk", scores, k)
        return jnp.mean(jnp.tanh(x + jnp.einsum("bthk,hke->bte", out, params["o"])) ** 2)

    specs = {"q": P(None, None, "data"), "k": P("tensor", ("fsdp", "data")), "o": P()}
    stored = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    rows = NamedSharding(mesh, P("fsdp", None, ("tensor", "data")))
    gradient = jax.grad(lambda params, x: loss(params, x, constrain=True))
    compiled = jax.jit(gradient, in_shardings=(stored, rows), out_shardings=stored)
    return error(compiled(params, x), jax.grad(loss)(params, x))


def error(seen, true):
    """The largest error of any leaf, relative to that leaf's largest value."""
    pairs = zip(jax.tree.leaves(seen), jax.tree.leaves(true), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


def main():
    """Prints a row for each program."""
    print(f"jax {jax.__version__}, {jax.default_backend()}")
    for batch in (("data", "fsdp"), ("fsdp", "data")):
        print(f"two products, 2 x 2 x 2, rows over {batch}: {two_products(batch):.1e}")
        print(f"one product, rows over {batch}: {one_product(batch)}")
    for sizes in ((2, 2, 1), (1, 2, 4)):
        off = two_products(("data", "fsdp"), sizes)
        print(f"two products, {sizes}, rows over (data, fsdp): {off:.1e}")
    for kernel in (1, 3):
        for devices in (1, 8):
            for rows in (8, 32):
                found = vmapped_convolution(kernel, devices, rows)
                size = f"{kernel} x {kernel}, {rows // 8} rows a part, {devices} devices"
                print(f"vmapped convolution, {size}: {found:.1e}")
    for images in (("data",), ("data", "tensor")):
        print(f"3 x 3 convolution, images over {images}: {split_images(images):.1e}")
    for window in (None, "tensor"):
        print(f"strided convolution, window over {window}: {split_window(window):.1e}")
    for embed in (("fsdp", "tensor"), ("tensor", "fsdp")):
        print(f"grouped queries, embed over {embed}: {grouped_queries(embed):.1e}")


if __name__ == "__main__":
    main()
