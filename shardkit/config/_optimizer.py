"""`OptimizerConfig`: an optax chain as data: clipping, update rule, weight decay, schedule."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from .._core.errors import ConfigError, Problem, raise_all
from .._core.options import check_options
from .._core.tree import path_str

Schedule = Callable[[Any], Any]

_FRACTIONS, _RATES = ("warmup_fraction", "final_lr_fraction"), ("lr", "muon_lr", "grad_clip_norm")
# What a number must be, one that is, and the fields.
_RANGES: tuple[tuple[str, str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("must be from 0 to 1.", "0.1", lambda x: 0 <= x <= 1, _FRACTIONS),
    ("must be positive and finite.", "1e-3", lambda x: 0 < x < math.inf, _RATES),
    ("must be finite and not negative.", "0.1", lambda x: 0 <= x < math.inf, ("weight_decay",)),
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: the update rule.
      lr: peak learning rate.
      warmup_fraction: fraction of the steps in which the rate rises linearly from 0.
      final_lr_fraction: the last rate as a fraction of `lr`, reached along a cosine.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      weight_decay: decoupled decay of matrices; scales of norms are not decayed.
      betas: decay rates of the two moments; sgd uses the first as momentum.
      muon_lr: learning rate of hidden matrices with `muon`, whose updates have a spectral norm
        of about 1; adamw updates all other leaves with `lr`.
    """

    name: Literal["adamw", "lion", "muon", "sgd"] = "adamw"
    lr: float = 3e-3
    warmup_fraction: float = 0.05
    final_lr_fraction: float = 0.1
    grad_clip_norm: float | None = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    muon_lr: float = 0.02

    def __post_init__(self) -> None:
        """Refuses rates and fractions that a schedule cannot have."""
        check_options(self, ConfigError, "There is no such optimizer.", "optimizer.")
        problems = [
            Problem(f"optimizer.{name}={value:g}", why, f"--set optimizer.{name}={near}")
            for why, near, is_legal, names in _RANGES
            for name in names
            if (value := getattr(self, name)) is not None and not is_legal(value)
        ]
        raise_all(ConfigError, "The optimizer cannot be built.", problems)

    def schedule(self, steps: int, peak: float) -> Schedule:
        """Returns the learning rate as a function of the step: linear warm-up, then a cosine."""
        warmup = round(self.warmup_fraction * steps)
        return optax.warmup_cosine_decay_schedule(
            init_value=peak if warmup == 0 else 0.0,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(steps, warmup + 1),
            end_value=self.final_lr_fraction * peak,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """Returns the chain for a run of `steps` updates."""
        clip = (
            [] if self.grad_clip_norm is None else [optax.clip_by_global_norm(self.grad_clip_norm)]
        )
        return optax.chain(*clip, self._update(steps))

    def _update(self, steps: int) -> optax.GradientTransformation:
        rate = self.schedule(steps, self.lr)
        first, second = self.betas
        decay: dict[str, Any] = {"weight_decay": self.weight_decay, "mask": _matrices}
        if self.name == "sgd":
            return optax.chain(
                optax.add_decayed_weights(self.weight_decay, _matrices),
                optax.sgd(rate, momentum=first),
            )
        if self.name == "lion":
            return optax.lion(rate, first, second, **decay)
        if self.name == "muon":
            return self._muon(steps)
        return optax.adamw(rate, first, second, **decay)

    def _muon(self, steps: int) -> optax.GradientTransformation:
        """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), adamw for others."""
        first, second = self.betas
        return contrib.muon(
            self.schedule(steps, self.muon_lr),
            weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=_hidden_matrices,
            adam_learning_rate=self.schedule(steps, self.lr),
            adam_b1=first,
            adam_b2=second,
        )


def _matrices(params: Any) -> Any:
    """Selects leaves to decay. Scanned layers stack the scales of norms, so rank is not enough."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        return jnp.ndim(leaf) >= 2 and "norm" not in path_str(path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _hidden_matrices(params: Any) -> Any:
    """Returns which dims of a scanned layer's leaf are rows and columns; None for other leaves."""

    def dims(path: tuple[Any, ...], leaf: Any) -> contrib.MuonDimensionNumbers | None:
        name = path_str(path)
        if not name.startswith("layers/") or jnp.ndim(leaf) < 3:
            return None
        last = jnp.ndim(leaf) - 1
        rows = tuple(range(1, last)) if name == "layers/out" else (1,)
        columns = (last,) if name == "layers/out" else tuple(range(2, last + 1))
        return contrib.MuonDimensionNumbers(rows, columns)

    return jax.tree_util.tree_map_with_path(dims, params)
