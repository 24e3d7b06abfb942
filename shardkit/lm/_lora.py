"""`LoraConfig`: low-rank adapters of the reference decoder, as a group of a config."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.options import check_options
from .._core.types import Key, Params, WithAxes, has_axes
from ..adapters import Model
from ..peft import LoraModel, QuantizedModel, lora, quantize

# What each dim of a weight is: `s` stacked, `i` inputs, `o` outputs.
_DIMS = {
    **dict.fromkeys(("query", "key", "value"), "sioo"),
    "out": "siio",
    **dict.fromkeys(("gate", "up", "down", "router"), "sio"),
    **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), "ssio"),
}
_ROUTER = "router"  # small, and decides more than it computes


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which alone are trained; see `sk.lora`.

    Attributes:
      rank: of every adapter; None for no adapters: all weights are trained.
      alpha: x W becomes x W + alpha / rank · (x A) B; None for a factor of 1.
      dropout: probability that an element of x is dropped before A, in training.
      targets: weights of a block that are adapted: `query key value out gate up down`, `router`,
        `expert_gate expert_up expert_down`.
      fold: whether A B is added to the weight instead of followed to its products: more FLOPs, no
        dropout.
      base_dtype: of the frozen weights on the devices; None for that of the weights' files, or
        float32 without them.
      quantize: the blocks' frozen matrices become codes of 8 or 4 bits, which stand for weights of
        `base_dtype`; see `sk.quantize`. None leaves them as they are.
      block: elements that share a scale, of the last dim of what a device has of a matrix.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "out")
    fold: bool = False
    base_dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Literal["int8", "nf4"] | None = None
    block: int = 64

    def __post_init__(self) -> None:
        """Refuses ranks and targets that no decoder has."""
        headline = "The adapters are declared wrongly."
        check_options(self, ConfigError, headline, "lora.")
        problems = []
        if self.rank is not None and self.rank < 1:
            problems.append(_problem(f"rank={self.rank}", "must be at least 1", "rank=8"))
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            problems.append(_problem(f"alpha={self.alpha:g}", "must be positive", "alpha=16"))
        if not 0 <= self.dropout < 1:
            why = "must be at least 0 and below 1"
            problems.append(_problem(f"dropout={self.dropout:g}", why, "dropout=0.05"))
        if self.fold and self.dropout:
            why = "drops elements of an input, which a folded adapter does not have"
            problems.append(_problem(f"dropout={self.dropout:g}", why, "dropout=0"))
        codes = f"quantize={self.quantize}"
        if self.quantize and self.rank is None:
            why = "freezes the weights, and there are no adapters to train"
            problems.append(_problem(codes, why, "rank=8"))
        if self.quantize and self.fold:
            why = "has no floats that A B could be added to before the loss"
            problems.append(_problem(codes, why, "fold=false, or lora.quantize=none"))
        if self.block < 1 or (self.quantize == "nf4" and self.block % 2):
            why = "is not a positive number of elements, even for nf4"
            problems.append(_problem(f"block={self.block}", why, "block=64"))
        for name in self.targets:
            if name not in _DIMS:
                why = f"has no weight {name!r}; known: {', '.join(_DIMS)}."
                why += did_you_mean(name, _DIMS)
                problems.append(_problem(f"targets={name}", why, "targets=query,value"))
        if not self.targets:
            problems.append(_problem("targets", "are none", "targets=query,value"))
        raise_all(ConfigError, headline, problems)

    def adapt(self, model: Model) -> LoraModel:
        """Adds the adapters to a reference decoder, whose weights get the dtype `base_dtype`.

        Raises:
          StepError: the decoder lacks a target.
        """
        assert self.rank is not None, "without a rank there is nothing to add"
        base = _cast(model, self.base_dtype or "float32")
        ranks = {f"layers/{name}": (self.rank, _DIMS[name]) for name in self.targets}
        options: dict[str, Any] = {"alpha": self.alpha, "dropout": self.dropout, "fold": self.fold}
        return lora(base.init, base.loss_fn, ranks, **options)

    def quantize_base(self, adapted: LoraModel) -> QuantizedModel | None:
        """The same model with codes in place of the frozen matrices; None if none are asked for.

        Raises:
          StepError: the block does not divide a matrix.
        """
        if self.quantize is None:
            return None
        layers = jax.eval_shape(adapted.init, jax.random.key(0))["layers"]
        names = [name for name in _DIMS if name in layers and name != _ROUTER]
        kinds = {f"layers/{name}": (self.quantize, self.block) for name in names}
        return quantize(adapted.init, adapted.loss_fn, kinds)


def _problem(subject: str, why: str, fix: str) -> Problem:
    return Problem(f"lora.{subject}", why, f"--set lora.{fix}")


def _cast(model: Model, dtype: str) -> Model:
    """The same model whose `init` returns floats of a dtype."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, WithAxes):
            return WithAxes(leaf.value.astype(dtype), leaf.axes)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def init(key: Key) -> Params:
        return jax.tree.map(cast, model.init(key), is_leaf=has_axes)

    return model if dtype == "float32" else dataclasses.replace(model, init=init)
