"""`sk.lora`: low-rank adapters (Hu et al. 2021) on any model, by the paths of its weights."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import numpy as np

from .._core.errors import CheckpointError, Problem, ShardkitError, StepError, raise_all
from .._core.options import option_problems
from .._core.own_sharding import on_any_mesh
from .._core.tree import leaves_by_path, path_str
from .._core.types import Batch, Key, Loss, Params, Variables, WithAxes, strip_axes
from ..adapters._model import nest
from ..rules import list_named_leaves
from ._declare import (
    Alpha,
    Rank,
    choose_leaves,
    infer_by_names,
    infer_from_products,
    loss_problems,
    scale_leaves,
)
from ._factors import ADAPTERS, AdaptedLeaf
from ._files import Names, module_names, read_adapter, write_adapter
from ._products import Products
from ._tracked import Tracked

# Folded into keys, so that the model's own draws stay what they were.
_INIT, _DROPOUT = 0x10AA, 0x10AB
_BASE = "base"


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """A model with low-rank adapters: the `init` and `loss_fn` of a `sk.StepSpec`.

    If the model's parameters are a dict, the adapters are beside them under the key `lora`, so
    every path stays what it was; else the two are `{"base": ..., "lora": ...}`. The factors of a
    weight are `lora/<its path>/a` and `lora/<its path>/b`.

    Attributes:
      init: `key -> params`, or `key -> sk.Variables`, as the model's.
      loss_fn: the loss with adapters; it names them as trainable, and their layout.
      adapted: path, rank, dims and scale of each adapted weight.
      alpha: as it is declared.
      dropout: as it is declared.
      rank_stabilized: as it is declared.
      beside: whether the adapters are beside the model's own parameters.
    """

    init: Callable[[Key], Params | Variables]
    loss_fn: Loss
    adapted: tuple[AdaptedLeaf, ...]
    alpha: Alpha
    dropout: float
    rank_stabilized: bool
    beside: bool

    def base(self, params: Params) -> Params:
        """The parameters of the model without the adapters, as its own `init` returns them."""
        return self._split(params, StepError)[0]

    def merge(self, params: Params) -> Params:
        """Returns plain weights: W + scale · A B where W is adapted, in its dtype and sharding.

        Args:
          params: `state.params`, on any mesh, or traced. Weights without an adapter are returned
            as they are: use the result before the next step takes the state.

        Returns:
          The parameters as the model's own `init` returns them: `model.bind(lora.merge(params))`.

        Raises:
          StepError: they have no adapters, or a weight is on no device.
        """
        base, own = self._split(params, StepError, jax.Array)

        def merge(one: AdaptedLeaf, weight: Any, factors: Mapping[str, Any]) -> Any:
            traced = isinstance(weight, jax.core.Tracer)
            run = one.merge if traced else jax.jit(one.merge, out_shardings=weight.sharding)
            return run(weight, factors["a"], factors["b"])

        return _replace(self.adapted, base, own, merge)

    def save(
        self,
        folder: str | os.PathLike[str],
        params: Params,
        *,
        names: Names = module_names,
        base_model: str = "",
        task_type: str | None = None,
    ) -> None:
        """Writes the adapters alone as PEFT does; needs the extra `[safetensors]`.

        `adapter_model.safetensors` has `base_model.model.<module>.lora_A.weight` f[rank, inputs]
        and `lora_B.weight` f[outputs, rank], `adapter_config.json` their ranks and scales. Several
        processes make the call together; the first one gathers the adapters and writes the files.

        Args:
          folder: exists, or is made; files in it are not overwritten.
          params: `state.params`; the adapters are copied to the host.
          names: `(path, index) -> module` of a weight; the index, a tuple, is that of a matrix in
            stacked ones, else (). By default the path with dots, without a last `kernel` or
            `weight`, the index behind.
          base_model: name or folder of the model, for `base_model_name_or_path`.
          task_type: of PEFT, such as `"CAUSAL_LM"`.

        Raises:
          CheckpointError: a file exists or cannot be written, or two matrices have one name. Of
            several processes all raise it.
        """
        _, own = self._split(params, CheckpointError, jax.Array, np.ndarray)
        factors = _flatten(self.adapted, own)
        config = {"base_model_name_or_path": base_model or None, "task_type": task_type}
        config |= {"lora_dropout": self.dropout, "use_rslora": self.rank_stabilized}
        write_adapter(folder, self.adapted, factors, names, config)

    def load(
        self, folder: str | os.PathLike[str], params: Params, *, names: Names = module_names
    ) -> Params:
        """Returns parameters with the adapters that PEFT or `save` wrote.

        Args:
          folder: with the two files. Only numbers and texts are read from them, and shapes and
            dtypes are compared before arrays are made.
          params: `state.params`, or abstract ones with shardings; the adapters get the dtypes and
            shardings that theirs have.
          names: as in `save`.

        Raises:
          CheckpointError: a file cannot be read; or with every tensor that is missing, extra or of
            another shape, and every setting by which the adapters would compute other numbers.
        """
        base, own = self._split(params, CheckpointError, jax.Array, jax.ShapeDtypeStruct)
        adapters = read_adapter(folder, self.adapted, _flatten(self.adapted, own), names)
        return _join(base, adapters, self.beside)

    def _split(
        self, params: Params, error: type[ShardkitError], *kinds: type
    ) -> tuple[Params, Params]:
        """The model's own parameters and the adapters, which are checked to be of some kinds."""
        fix, problems = "the state.params of a step whose init is this one's", list[Problem]()
        try:
            base, own = _split(params, self.beside)
            factors = _flatten(self.adapted, own)
        except (KeyError, TypeError):
            why = f"has no {ADAPTERS}/<path>/a and b of each adapted weight: merged ones have none"
            raise_all(error, "Parameters have no adapters.", [Problem("params", why, fix)])
            raise
        leaves = {f"{ADAPTERS}/{p}/{n}": x for p, pair in factors.items() for n, x in pair.items()}
        if kinds == (jax.Array,):
            weights = leaves_by_path(base)
            leaves |= {path: weights[path] for path in factors}
        for name, x in leaves.items():
            if kinds and (not isinstance(x, kinds) or getattr(x, "sharding", self) is None):
                known = " or ".join(kind.__name__.rpartition(".")[2] for kind in kinds)
                why = f"is {type(x).__name__}, which has no sharding; {known} is taken"
                problems.append(Problem(name, why, fix))
        raise_all(error, "Parameters are not those of a state.", problems)
        return base, own


def lora(
    init: Callable[[Key], Params | Variables],
    loss_fn: Callable[..., Any],
    ranks: Mapping[str, Rank],
    *,
    alpha: Alpha = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    fold: bool = False,
    batch: Batch = None,
) -> LoraModel:
    """Adds low-rank adapters to a model, of which alone are trained.

    Each adapted weight W of a product x W computes x W + scale · (x A) B. A starts random and B at
    zero, so the first loss is that of the model. W is frozen: it has no gradient, and its products
    are not differentiated for one. A and B are split over devices like the dims of W that they
    have; a strategy's rules are for the model's own parameters.

    Args:
      init: of the model, or of what `sk.from_nnx`, `from_linen` or `from_equinox` return.
      loss_fn: the same; any loss that `sk.StepSpec` takes, but for an `sk.ShardMapLoss`.
      ranks: `{glob over paths: rank}`, the first match wins. None: no adapter. `(rank, dims)` also
        says with a letter per dim what they are: `i` inputs, which products contract, `o` outputs,
        `s` stacked (layers, experts), as in `(8, "sioo")` for [layers, embed, heads, head_dim].
      alpha: scale is alpha / rank; None for a scale of 1. `{glob: alpha}` over adapted paths, of
        which the first match wins, is PEFT's `alpha_pattern`.
      rank_stabilized: scale is alpha / √rank (Kalajdzievski 2023).
      dropout: probability that an element of x is dropped before A, in training; each product
        draws its own.
      fold: whether to add scale · A B to W before the loss instead of following W to its products.
        This works for whatever the loss does to W, under every strategy, but computes and reduces
        gradients as large as W.
      batch: of the step, abstract or not. With it, dims that `ranks` does not say are read from
        the products of the loss. Without, stacked ones are known by the logical axes `layers` and
        `experts`, and two others are [inputs, outputs]; a product that contracts other dims is an
        error when the step is compiled.

    Returns:
      The model with adapters.

    Raises:
      StepError: a glob matches nothing or never first, or a weight cannot be adapted; names all of
        them.

    >>> import jax.numpy as jnp
    >>> adapted = lora(
    ...     lambda key: {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))},
    ...     lambda params, batch, key: jnp.mean((batch @ params["up"] @ params["down"]) ** 2),
    ...     {"up": 2}, alpha=4)
    >>> params = adapted.init(jax.random.key(0))
    >>> {name: x.shape for name, x in params["lora"]["up"].items()}
    {'a': (4, 2), 'b': (2, 6)}
    >>> float(adapted.loss_fn(params, jnp.ones((3, 4)), jax.random.key(1)))
    576.0
    """
    _check_options(loss_fn, alpha, rank_stabilized, dropout, fold)
    initial = on_any_mesh(jax.eval_shape)(init, jax.eval_shape(lambda: jax.random.key(0)))
    has_state = isinstance(initial, Variables)
    named = initial.params if has_state else initial
    beside = type(named) is dict
    if beside and ADAPTERS in named:
        why = "is a key of the model's parameters, and that of the adapters"
        problem = Problem(repr(ADAPTERS), why, 'init=lambda key: {"model": init(key)}')
        raise_all(StepError, "Low-rank adapters have no place.", [problem])

    adapted = choose_leaves(ranks, list_named_leaves(named))
    adapted = scale_leaves(adapted, alpha, rank_stabilized)
    loss = loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn, loss_fn)
    if batch is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        rest = (batch, key, *((initial.model_state,) if has_state else ()))
        adapted = infer_from_products(adapted, loss.train, strip_axes(named), rest)
    adapted = tuple(infer_by_names(adapted))
    build = functools.partial(_build_loss, adapted=adapted, beside=beside, fold=fold)
    tree = "" if beside else _BASE
    with_adapters = dataclasses.replace(
        loss,
        train=build(loss.train, dropout=dropout),
        evaluate=build(loss.evaluate, dropout=0.0),
        trainable=f"{ADAPTERS}/**",
        follows=tuple(follows for one in adapted for follows in one.follows(tree)),
    )
    return LoraModel(
        init=functools.partial(_init, init, adapted, beside),
        loss_fn=with_adapters,
        adapted=adapted,
        alpha=alpha,
        dropout=dropout,
        rank_stabilized=rank_stabilized,
        beside=beside,
    )


def _check_options(loss_fn: Any, alpha: Any, rank_stabilized: Any, dropout: Any, fold: Any) -> None:
    problems = option_problems(
        alpha=(alpha, float | Mapping[str, float | None] | None),
        rank_stabilized=(rank_stabilized, bool),
        dropout=(dropout, float),
        fold=(fold, bool),
    )
    if not problems and isinstance(alpha, int | float) and not 0 < alpha < math.inf:
        problems.append(Problem("alpha", f"{alpha} is not positive and finite", "alpha=16"))
    if not problems and not 0 <= dropout < 1:
        problems.append(Problem("dropout", f"{dropout} is not in [0, 1)", "dropout=0.05"))
    if not problems and fold and dropout:
        why = "drops elements of an input, and fold=True adds A B to the weight, which has none"
        problems.append(Problem("dropout", why, "fold=False or dropout=0"))
    if not problems and rank_stabilized and alpha is None:
        problems.append(Problem("rank_stabilized", "needs an alpha", "alpha=16"))
    problems += loss_problems(loss_fn)
    raise_all(StepError, "Low-rank adapters have wrong options.", problems)


def _init(
    init: Callable[[Key], Any], adapted: tuple[AdaptedLeaf, ...], beside: bool, key: Key
) -> Params | Variables:
    initial = init(key)
    base = initial.params if isinstance(initial, Variables) else initial
    own, adapters = jax.random.fold_in(key, _INIT), {}
    for index, one in enumerate(adapted):
        factors = one.init(jax.random.fold_in(own, index))
        adapters[one.leaf.path] = {
            name: x if (axes := one.axes(name)) is None else WithAxes(x, axes)
            for name, x in factors.items()
        }
    params = _join(base, adapters, beside)
    return Variables(params, initial.model_state) if isinstance(initial, Variables) else params


def _build_loss(
    loss: Callable[..., Any],
    *,
    adapted: tuple[AdaptedLeaf, ...],
    beside: bool,
    fold: bool,
    dropout: float,
) -> Callable[..., Any]:
    def run(params: Params, batch: Batch, key: Key, *model_state: Any) -> Any:
        base, own = _split(params, beside)
        if fold:
            folded = _replace(adapted, base, own, lambda one, w, x: one.merge(w, x["a"], x["b"]))
            return loss(folded, batch, key, *model_state)
        weights = _replace(adapted, base, own, Tracked.start)
        own_key = jax.random.fold_in(key, _DROPOUT) if dropout else None
        return Products(dropout).call(loss, (base, batch, key, *model_state), weights, own_key)

    return run


def _split(params: Params, beside: bool) -> tuple[Params, Params]:
    """The model's own parameters, and the tree of the adapters."""
    if not beside:
        return params[_BASE], params[ADAPTERS]
    return {name: x for name, x in params.items() if name != ADAPTERS}, params[ADAPTERS]


def _join(base: Params, adapters: Mapping[str, Mapping[str, Any]], beside: bool) -> Params:
    """All parameters; `adapters` are `{path of the weight: factors}`."""
    pairs = [(_parts(p, name), x) for p, xs in adapters.items() for name, x in xs.items()]
    return {**(base if beside else {_BASE: base}), ADAPTERS: nest(pairs)}


def _flatten(adapted: tuple[AdaptedLeaf, ...], own: Params) -> dict[str, dict[str, Any]]:
    """`{path of the weight: factors}` of the tree of the adapters."""
    return {
        one.leaf.path: {
            name: functools.reduce(lambda node, key: node[key], _parts(one.leaf.path, name), own)
            for name in one.factors
        }
        for one in adapted
    }


def _parts(path: str, name: str) -> list[str]:
    return [*(path.split("/") if path else []), name]


def _replace(
    adapted: tuple[AdaptedLeaf, ...], base: Params, own: Params, change: Callable[..., Any]
) -> Params:
    """The model's own parameters, each adapted one changed by `(leaf, weight, factors)`."""
    by_path, factors = {one.leaf.path: one for one in adapted}, _flatten(adapted, own)

    def replace(path: tuple[Any, ...], x: Any) -> Any:
        one = by_path.get(path_str(path))
        return x if one is None else change(one, x, factors[one.leaf.path])

    return jax.tree_util.tree_map_with_path(replace, base)
