"""What a run of k steps tells: arrays on the host, by check and by path."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core.tree import leaves_by_path

Leaves = dict[str, np.ndarray]
"""`{path: array}`, on the host."""

Record = dict[str, Leaves]
"""`{name of a check: what was found}`; the reference and every mesh fill the same names."""

# The checks that compare numbers, in the order of the certificate.
INIT, LOSS, GRADIENTS, NORM = "init", "loss", "gradients", "grad_norm"
METRICS, EVALUATE, SGD = "metrics", "evaluate", "sgd update"
LATER_LOSS, LATER_STATE = "k-step loss", "k-step state"
NUMBERS = (LOSS, GRADIENTS, NORM, METRICS, SGD, LATER_LOSS, LATER_STATE, EVALUATE)

# Those that need a program of their own, beside that of the step and of the first state.
OWN_PROGRAM = (GRADIENTS, SGD, EVALUATE)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the reference and every mesh are given.

    Attributes:
      batches: host batches; step t takes the one at t modulo their number.
      steps: updates with the declared optimizer.
      key: typed PRNG key[] of the initial state.
    """

    batches: Sequence[Any]
    steps: int
    key: jax.Array

    def batch(self, step: int) -> Any:
        """The batch of a step, counted from 0."""
        return self.batches[step % len(self.batches)]


def host(tree: Any, prefix: str = "") -> Leaves:
    """Copies the leaves of a pytree to the host, a typed key as the words that hold it."""
    return {path: to_host(x) for path, x in leaves_by_path(tree, prefix).items()}


def to_host(x: Any) -> np.ndarray:
    """Copies one array to the host."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def of_steps(metrics: Sequence[dict[str, Any]]) -> Record:
    """Sorts the metrics of each step by check."""
    first = metrics[0]
    own = [name for name in first if name not in ("loss", "grad_norm")]
    return {
        LOSS: {"loss": np.asarray(first["loss"])},
        NORM: {"grad_norm": np.asarray(first["grad_norm"])},
        METRICS: {name: np.asarray(first[name]) for name in own},
        LATER_LOSS: {f"step {t + 1}": np.asarray(m["loss"]) for t, m in enumerate(metrics)},
    }


def clipped_sgd(params: Leaves, grads: Leaves) -> optax.GradientTransformation:
    """SGD whose clip is active and whose update is a tenth of the parameters in norm.

    Adam would hide a gradient of the wrong scale. The clip, at half of the gradient's norm, needs
    the norm over all devices; the size of the update makes an error in it show in the parameters.

    Args:
      params: of the first state, on the reference.
      grads: of its first step; not all zero.
    """
    limit = norm(grads) / 2
    return optax.chain(
        optax.clip_by_global_norm(limit), optax.sgd(0.1 * (norm(params) or 1.0) / limit)
    )


def norm(leaves: Leaves) -> float:
    """Euclidean norm of all leaves together, summed in f64."""
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in leaves.values())))
