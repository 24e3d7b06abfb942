"""Holds models of other libraries, on a mesh, to plain JAX on one device.

A cell is a layout × accumulation × precision × mode. In each the step is either right, or refused
with an error in five parts that the model expects there; nothing is silently other, and nothing
raises an error of JAX.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

STEPS = 2
# Its first state is the gradient, so that one compiled step shows gradients and parameters.
SGD = optax.chain(optax.trace(0.0), optax.sgd(0.1))
# Largest error of a leaf, as a norm over the leaf's or over a part of the largest leaf's norm. In
# bf16 a right step is within 3e-2, and a leaf of a tenth more is not.
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (8e-2, 1e-1)}

# A model that marks nothing cannot be split over products by explicit collectives.
UNMARKED = ("tensor shard_map", "splits neither rows nor products|never marks")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as its authors write it, and the same in plain JAX.

    Attributes:
      init, loss_fn: for `sk.StepSpec`.
      batch: numpy arrays.
      plain: `(params, model_state, batch) -> (total, weight, model_state)` in plain JAX.
      layouts: name → (strategy, sizes of the mesh).
      accumulate: of the cells with accumulation: two micro-batches.
      has_rows: whether dim 0 of every batch leaf counts rows.
      refused: (words of a cell, words of the error) of cells that may be refused.
      optimizer: by default plain SGD.
      extra: the part of the optimizer's state that is compared, beside the parameters.
    """

    init: Callable[..., Any]
    loss_fn: Any
    batch: Mapping[str, np.ndarray]
    plain: Callable[..., Any]
    layouts: Mapping[str, tuple[sk.Strategy, Mapping[str, int]]]
    accumulate: int | sk.Accumulate = 2
    has_rows: bool = True
    refused: tuple[tuple[str, str], ...] = ()
    optimizer: Any = SGD
    extra: Callable[[Any], Any] = lambda opt_state: opt_state[0]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to compile a model."""

    layout: str
    accumulates: bool
    precision: str
    mode: str

    def __str__(self) -> str:
        words = [self.layout, "accumulate" if self.accumulates else "", self.precision, self.mode]
        return " ".join(filter(None, words))


CELLS = [
    Cell(*choice)
    for choice in itertools.product(
        ("data", "fsdp", "tensor"), (False, True), ("float32", "bfloat16"), ("auto", "shard_map")
    )
]


def layouts(tensor: Mapping[str, P]) -> dict[str, Any]:
    """The three layouts of a model without logical names; `tensor` has its split leaves."""
    split = sk.PathRules({**tensor, "**": sk.REPLICATED})
    largest = sk.first_match(sk.shard_largest("fsdp", min_size=64), sk.REPLICATED)
    return {
        "data": (sk.Strategy(params=sk.REPLICATED, batch=P("data")), {"data": 4}),
        "fsdp": (sk.Strategy(params=largest, batch=P("fsdp")), {"fsdp": 4}),
        "tensor": (sk.Strategy(params=split, batch=P("data")), {"data": 2, "tensor": 2}),
    }


def named_layouts() -> dict[str, Any]:
    """The three layouts of a model with logical names."""
    kinds = sk.strategies
    return {
        "data": (kinds.data(), {"data": 4}),
        "fsdp": (kinds.fsdp(), {"fsdp": 4}),
        "tensor": (kinds.data() | kinds.tensor(), {"data": 2, "tensor": 2}),
    }


def check(model: Model, cell: Cell) -> str:
    """Returns "right", or why the cell is refused.

    Raises:
      AssertionError: other numbers, or a refusal that the model does not expect.
    """
    strategy, sizes = model.layouts[cell.layout]
    devices = jax.devices()[: math.prod(sizes.values())]
    try:
        step = sk.compile_step(
            model.loss_fn,
            model.optimizer,
            init=model.init,
            batch=model.batch,
            mesh=sk.MeshSpec(**sizes).build(devices=devices),
            strategy=strategy,
            accumulate=model.accumulate if cell.accumulates else 1,
            precision=cell.precision,
            mode=cell.mode,
        )
    except sk.ShardkitError as error:
        reason = str(error)
        assert "Fix:" in reason, reason
        assert any(_matches(row, cell, reason) for row in model.refused), reason
        return f"refused: {reason.splitlines()[1].strip()}"
    state = step.init(jax.random.key(0))
    start = to_host((state.params, state.model_state))
    seen = []
    for _ in range(STEPS):
        state, metrics = step(state, model.batch)
        seen.append(float(metrics["loss"]))
    wanted = train_plainly(model, start, cell)
    compare(cell, "loss", {"loss": np.asarray(seen)}, {"loss": wanted[0]})
    compare(cell, "optimizer", model.extra(to_host(state.opt_state)), model.extra(wanted[2]))
    moved = [jax.tree.map(np.subtract, p, start[0]) for p in (to_host(state.params), wanted[1])]
    compare(cell, "update", *moved)
    compare(cell, "model_state", to_host(state.model_state), wanted[3])
    return "right"


def _matches(row: tuple[str, str], cell: Cell, reason: str) -> bool:
    words, pattern = row
    return all(word in str(cell).split() for word in words.split()) and bool(
        re.search(pattern, reason)
    )


def train_plainly(model: Model, start: Any, cell: Cell) -> tuple[Any, Any, Any, Any]:
    """Losses, parameters, optimizer state and model state of plain JAX on one device."""
    params, model_state = jax.device_put(start, jax.devices()[0])
    opt_state = model.optimizer.init(params)
    n = 2 if cell.accumulates else 1

    def low(x: Any) -> Any:
        return x.astype(cell.precision) if jnp.issubdtype(x.dtype, jnp.floating) else x

    @jax.jit
    def total_and_grads(params: Any, model_state: Any, rows: Any) -> Any:
        def loss(params: Any) -> Any:
            total, weight, after = model.plain(params, model_state, rows)
            return total.astype(jnp.float32), (weight, after)

        return jax.value_and_grad(loss, has_aux=True)(jax.tree.map(low, params))

    losses = []
    for _ in range(STEPS):
        total, weight, grads = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
        for i in range(n):
            rows = {name: x[i::n] if model.has_rows else x for name, x in model.batch.items()}
            (value, (w, model_state)), micro = total_and_grads(params, model_state, rows)
            total, weight = total + value, weight + w
            grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, micro)
        grads = jax.tree.map(lambda g, w=weight: g / w, grads)
        updates, opt_state = model.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(total / weight))
    return np.asarray(losses), to_host(params), to_host(opt_state), to_host(model_state)


def compare(cell: Cell, what: str, seen: Any, wanted: Any) -> None:
    """Asserts that every leaf is within the limit of the cell's precision."""
    limit, floor = LIMITS[cell.precision]
    assert jax.tree.structure(seen) == jax.tree.structure(wanted)
    norms = [np.linalg.norm(np.ravel(x)) for x in jax.tree.leaves(wanted)]
    least = floor * max(norms, default=0.0)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(seen), jax.tree.leaves(wanted), strict=True
    ):
        gap, norm = np.linalg.norm(np.ravel(x - y)), np.linalg.norm(np.ravel(y))
        name = f"{cell}: {what}{jax.tree_util.keystr(path)} {np.shape(x)}"
        assert np.isfinite(x).all(), name
        assert gap <= limit * max(norm, least), f"{name} is off by {gap / max(norm, least):.1e}"


def to_host(tree: Any) -> Any:
    """Copies a pytree to the host."""
    return jax.tree.map(lambda x: np.asarray(jnp.copy(x)), tree)
