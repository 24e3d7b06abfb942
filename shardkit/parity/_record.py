"""What is recorded of a run of k steps: arrays on the host, by check and by path."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core.tree import leaves_by_path
from .._core.types import Batch, Key, PyTree

Leaves = dict[str, np.ndarray]
"""`{path: array}`, on the host."""

Record = dict[str, Leaves]
"""`{name of a check: its arrays}`; the reference and every mesh record the same checks."""

# The checks that compare numbers, in the order of the parity report.
INIT, LOSS, GRADIENTS, NORM = "init", "loss", "gradients", "grad_norm"
METRICS, EVALUATE, SGD = "metrics", "evaluate", "sgd update"
LATER_LOSS, LATER_METRICS, LATER_STATE = "k-step loss", "k-step metrics", "k-step state"
LATER_EVALUATE, COUNTERS = "k-step evaluate", "counters"
NUMBERS = (
    *(LOSS, GRADIENTS, NORM, METRICS, SGD, LATER_LOSS, LATER_METRICS, LATER_STATE),
    *(EVALUATE, LATER_EVALUATE),
)
# What the first parameters decide, without a gradient.
NO_GRADIENTS = (LOSS, METRICS, EVALUATE)
AFTER_STEPS = (LATER_LOSS, LATER_METRICS, LATER_STATE, LATER_EVALUATE)
# Of these checks each leaf has a meaning and a magnitude of its own.
SCALARS = (METRICS, LATER_METRICS, EVALUATE, LATER_EVALUATE)

# Checks that compile a program of their own, besides those of the step and of the first state.
OWN_PROGRAM = (GRADIENTS, SGD, EVALUATE)


@dataclasses.dataclass(frozen=True)
class ParityInputs:
    """What the reference and every mesh run on."""

    batches: Sequence[Batch]  # host batches; step t uses number t modulo `len(batches)`
    steps: int  # updates with the declared optimizer
    key: Key  # typed PRNG key[] of the initial state

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.batches[step % len(self.batches)]


def copy_state_to_host(state: Any) -> Leaves:
    """Leaves that a `TrainState` and a `ReferenceState` share: `{"params/…": array}`."""
    return {
        path: x
        for part in ("params", "opt_state", "model_state")
        for path, x in copy_to_host(getattr(state, part), part).items()
    }


def select_counters(leaves: Leaves) -> Leaves:
    """The integer scalars of a state: counts of steps, which no rounding changes."""
    return {path: x for path, x in leaves.items() if x.ndim == 0 and x.dtype.kind in "iu"}


def copy_to_host(tree: PyTree, prefix: str = "") -> Leaves:
    """Copies the leaves of a pytree to the host; a typed key as its u32 data."""
    return {path: copy_leaf_to_host(x) for path, x in leaves_by_path(tree, prefix).items()}


def copy_leaf_to_host(x: jax.Array) -> np.ndarray:
    """Copies one array to the host; a typed key as its u32 data."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def group_metrics_by_check(metrics: Sequence[dict[str, Any]]) -> Record:
    """Sorts the metrics of all steps by check: `loss`, `grad_norm`, `metrics`, `k-step …`."""
    first = metrics[0]
    user_metrics = [name for name in first if name not in ("loss", "grad_norm")]
    return {
        LOSS: {"loss": np.asarray(first["loss"])},
        NORM: {"grad_norm": np.asarray(first["grad_norm"])},
        METRICS: {name: np.asarray(first[name]) for name in user_metrics},
        LATER_LOSS: {f"step {t + 1}": np.asarray(m["loss"]) for t, m in enumerate(metrics)},
        LATER_METRICS: {
            f"step {t + 1}/{name}": np.asarray(m[name])
            for t, m in enumerate(metrics)
            for name in m
            if t and name != "loss"
        },
    }


def clipped_sgd(params: Leaves, grads: Leaves) -> optax.GradientTransformation:
    """SGD with an active clip, whose update is a tenth of the parameters in norm.

    Adam hides a gradient of the wrong scale; SGD does not. The clip, at half of the gradient's
    norm, needs the norm over all devices. With |params| = 10 and |grads| = 4: the clip is 2, the
    rate 0.1 * 10 / 2 = 0.5, and the update has norm 1, large enough to show an error in f32. Both
    are those of the reference's first step; gradients are not all zero.
    """
    clip = global_norm(grads) / 2
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.sgd(0.1 * (global_norm(params) or 1.0) / clip)
    )


def global_norm(leaves: Leaves) -> float:
    """Euclidean norm of all leaves together, summed in f64."""
    return float(
        np.sqrt(sum(np.square(np.abs(x).astype(np.float64)).sum() for x in leaves.values()))
    )
