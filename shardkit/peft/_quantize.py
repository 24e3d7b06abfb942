"""`sk.quantize`: frozen weights in 8 or 4 bits (Dettmers et al. 2023), by their paths."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .._core.errors import Problem, StepError, raise_all
from .._core.own_sharding import on_any_mesh
from .._core.tree import Leaf, leaves_by_path, path_str
from .._core.types import (
    Batch,
    Key,
    Loss,
    Params,
    Trainable,
    Variables,
    WithAxes,
    has_axes,
    strip_axes,
)
from ..adapters._model import nest
from ..rules import list_named_leaves, selects
from ._at_use import Codes, call_with_codes
from ._blocks import SCALES, QuantizedLeaf
from ._declare import choose_by_globs, loss_problems

Kind = str | tuple[str, int] | None

_BLOCK = 64
_HEADLINE = "Quantized weights are declared wrongly."


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model with weights in few bits: the `init` and `loss_fn` of a `sk.StepSpec`.

    The codes of a weight have its path, dims and logical axes, so that a strategy's rules and the
    adapters of `sk.lora` hold for them; two nf4 codes are one byte, which halves the last dim. The
    scales are beside the model's parameters, at `scales/<its path>`.

    Attributes:
      init: `key -> params`, or `key -> sk.Variables`, as the model's.
      loss_fn: the loss of codes; it names them as frozen, and the layout of their scales.
      quantized: path, kind and block of each quantized weight.
    """

    init: Callable[[Key], Params | Variables]
    loss_fn: Loss
    quantized: tuple[QuantizedLeaf, ...]

    def quantize(self, params: Params) -> Params:
        """Codes and scales of weights that you have, such as those of a Hugging Face folder.

        Args:
          params: as the model's own `init` returns them, on any mesh, or traced. Leaf after leaf is
            quantized; each device quantizes its shard.

        Returns:
          The parameters of a step whose init is this one's: `step.init(key, params=...)`.

        Raises:
          StepError: a weight is missing or of another shape, or a shard of it is no whole number of
            blocks.
        """
        weights, problems = leaves_by_path(params), list[Problem]()
        for one in self.quantized:
            weight = weights.get(one.leaf.path)
            if weight is None or tuple(weight.shape) != one.leaf.shape:
                why = "is missing" if weight is None else f"has the shape {tuple(weight.shape)}"
                problems.append(Problem(str(one.leaf), why))
            elif not jnp.issubdtype(weight.dtype, jnp.floating):
                problems.append(Problem(str(one.leaf), f"is {weight.dtype}: quantized already?"))
            elif one.leaf.shape[-1] // (shards := _count_shards(weight)) % one.block:
                last = one.leaf.shape[-1] // shards
                why = f"has shards of {last} along its last dim, no multiple of its block of "
                problems.append(Problem(str(one.leaf), f"{why}{one.block}", one.fix(shards)))
        fix = "parameters as the init that was given to sk.quantize returns them"
        raise_all(StepError, "Weights cannot be quantized.", problems, fix)
        return _join(
            params, {one.leaf.path: _run_on_shards(one, weights) for one in self.quantized}
        )

    def dequantize(self, params: Params) -> Params:
        """Plain weights, in the dtypes and shapes that the model's own `init` gives them.

        Args:
          params: `state.params`, on any mesh, or traced.

        Raises:
          StepError: they have no scales.
        """
        if not isinstance(params, Mapping) or SCALES not in params:
            why = f"has no {SCALES!r}, which belong to codes"
            fix = "the state.params of a step whose init is this one's"
            raise StepError.of("Parameters are not quantized.", "params", why, fix)
        return _map_codes(self.quantized, params, lambda x: x.of.dequantize(x.codes, x.scales))


def quantize(
    init: Callable[[Key], Params | Variables],
    loss_fn: Callable[..., Any],
    kinds: Mapping[str, Kind],
) -> QuantizedModel:
    """Keeps weights of a model in 8 or 4 bits: frozen, and floats only where they are used.

    Blocks along the last dim share an f32 scale, their largest magnitude. A device holds 1.06 bytes
    per int8 weight and 0.56 per nf4 one (blocks of 64). They have no gradient and no optimizer
    state; adapters by `sk.lora`, or the other parameters, are trained:

        tuned = sk.lora(model.init, model.loss_fn, {"layers/query": 8})
        small = sk.quantize(tuned.init, tuned.loss_fn, {"layers/*": "nf4"})
        spec = sk.StepSpec(loss_fn=small.loss_fn, init=small.init, ...)

    Args:
      init: of the model, or of what `sk.lora`, `sk.from_nnx` or another adapter returns. Its
        parameters are a dict.
      loss_fn: the same; any loss that `sk.StepSpec` takes, but for an `sk.ShardMapLoss`.
      kinds: `{glob over paths: kind}`, the first match wins: `"int8"` (255 even levels) or `"nf4"`
        (16 quantiles of a normal distribution), None to leave weights as they are. `("nf4", 32)`
        also says how many elements share a scale, by default 64. A block must divide the part of
        the last dim that one device has.

    Returns:
      The model with quantized weights.

    Raises:
      StepError: a glob matches nothing or never first, or a weight cannot be quantized; names all.

    >>> small = quantize(
    ...     lambda key: {"up": jnp.ones((4, 64)), "bias": jnp.zeros(64)},
    ...     lambda params, batch, key: jnp.mean((batch @ params["up"] + params["bias"]) ** 2),
    ...     {"up": "nf4"})
    >>> params = small.init(jax.random.key(0))
    >>> {name: (x.shape, x.dtype.name) for name, x in params.items() if name != "scales"}
    {'bias': ((64,), 'float32'), 'up': ((4, 32), 'uint8')}
    >>> float(small.loss_fn(params, jnp.ones((2, 4)), jax.random.key(1)))
    16.0
    """
    raise_all(StepError, _HEADLINE, loss_problems(loss_fn))
    initial = on_any_mesh(jax.eval_shape)(init, jax.eval_shape(lambda: jax.random.key(0)))
    named = initial.params if isinstance(initial, Variables) else initial
    if type(named) is not dict or SCALES in named:
        found = f"have a key {SCALES!r}" if type(named) is dict else f"are a {type(named).__name__}"
        why = f"{found}; scales are kept beside them, in a dict under {SCALES!r}"
        fix = 'init=lambda key: {"model": init(key)}, and a loss of params["model"]'
        raise StepError.of(_HEADLINE, "the parameters", why, fix)
    quantized = _choose(kinds, list_named_leaves(named))
    loss = loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn, loss_fn)
    frozen = frozenset(one.leaf.path for one in quantized)
    build = functools.partial(functools.partial, _call, quantized)
    return QuantizedModel(
        init=functools.partial(_init, init, quantized),
        loss_fn=dataclasses.replace(
            loss,
            train=build(loss.train),
            evaluate=build(loss.evaluate),
            trainable=functools.partial(_is_trained, frozen, loss.trainable),
            follows=(*loss.follows, *(one.follows() for one in quantized)),
        ),
        quantized=quantized,
    )


def _choose(kinds: Mapping[str, Kind], leaves: Sequence[Leaf]) -> tuple[QuantizedLeaf, ...]:
    def explain(value: Any) -> str:
        kind, block = value if isinstance(value, tuple) and len(value) == 2 else (value, _BLOCK)
        known = value is None or kind in ("int8", "nf4")
        size = isinstance(block, int) and not isinstance(block, bool) and block > 0
        fine = known and size and not (kind == "nf4" and block % 2)
        return "" if fine else 'is not "int8", "nf4", (kind, an even block), or None for no codes'

    chosen = choose_by_globs(
        "kinds", kinds, leaves, explain=explain, example='{"**/kernel": "nf4"}', headline=_HEADLINE
    )
    problems, quantized = [], []
    for leaf, value in chosen:
        kind, block = value if isinstance(value, tuple) else (value, _BLOCK)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.shape or 0 in leaf.shape:
            problems.append(Problem(str(leaf), "is no array of floats", "another glob"))
        elif leaf.shape[-1] % block:
            largest = math.gcd(leaf.shape[-1], block)
            why = f"has a last dim of {leaf.shape[-1]}, which {block} does not divide"
            fits = largest > 1 or kind == "int8"
            fix = f'("{kind}", {largest})' if fits else 'another glob, or "int8"'
            problems.append(Problem(str(leaf), why, fix))
        quantized.append(QuantizedLeaf(leaf, kind, block))
    raise_all(StepError, _HEADLINE, problems)
    return tuple(quantized)


def _is_trained(frozen: frozenset[str], declared: Trainable, path: str) -> bool:
    """Whether a parameter is trained: as the model says, but for codes and scales."""
    return path not in frozen and not path.startswith(f"{SCALES}/") and selects(declared, path)


def _init(
    init: Callable[[Key], Any], quantized: tuple[QuantizedLeaf, ...], key: Key
) -> Params | Variables:
    initial = init(key)
    params = initial.params if isinstance(initial, Variables) else initial
    weights = leaves_by_path(params, is_leaf=has_axes)
    codes = {}
    for one in quantized:
        x = weights[one.leaf.path]
        pair = one.quantize(strip_axes(x))
        codes[one.leaf.path] = (
            tuple(WithAxes(part, x.axes) for part in pair) if has_axes(x) else pair
        )
    params = _join(params, codes)
    return Variables(params, initial.model_state) if isinstance(initial, Variables) else params


def _call(
    quantized: tuple[QuantizedLeaf, ...],
    loss: Callable[..., Any],
    params: Params,
    batch: Batch,
    key: Key,
    *model_state: Any,
) -> Any:
    weights = _map_codes(quantized, params, lambda x: x)
    shapes = _map_codes(
        quantized, params, lambda x: jax.eval_shape(x.of.dequantize, x.codes, x.scales)
    )
    return call_with_codes(loss, (shapes, batch, key, *model_state), weights)


def _map_codes(
    quantized: tuple[QuantizedLeaf, ...], params: Params, change: Callable[[Codes], Any]
) -> Params:
    """The model's own parameters, with what a function makes of each quantized one."""
    by_path, scales = {one.leaf.path: one for one in quantized}, leaves_by_path(params[SCALES])

    def replace(path: tuple[Any, ...], x: Any) -> Any:
        one = by_path.get(path_str(path))
        return x if one is None else change(Codes(x, scales[one.leaf.path], one))

    own = {name: x for name, x in params.items() if name != SCALES}
    return jax.tree_util.tree_map_with_path(replace, own)


def _join(params: Params, pairs: Mapping[str, tuple[Any, Any]]) -> Params:
    """Parameters with codes in the place of weights, and the scales; both by path."""

    def replace(path: tuple[Any, ...], x: Any) -> Any:
        name = path_str(path)
        return pairs[name][0] if name in pairs else x

    own = jax.tree_util.tree_map_with_path(replace, params, is_leaf=has_axes)
    return {**own, SCALES: nest((path.split("/"), pair[1]) for path, pair in pairs.items())}


def _run_on_shards(one: QuantizedLeaf, weights: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    weight = weights[one.leaf.path]
    if isinstance(weight, jax.core.Tracer):
        return one.quantize(weight)
    sharding = getattr(weight, "sharding", None)
    return jax.jit(one.quantize, out_shardings=sharding and (sharding, sharding))(weight)


def _count_shards(weight: Any) -> int:
    """How many shards of the last dim of a weight there are on devices."""
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or isinstance(weight, jax.core.Tracer):
        return 1
    return weight.shape[-1] // sharding.shard_shape(weight.shape)[-1]
