"""What a model marks for strategies to carry out, as a plan sees it.

Attention over a split length is no array program that a walk could follow by the names of dims: in
truth blocks travel. So where a length is to be split, `sk.nn.attention` is traced as one operation
forward and one backward, of which a walk knows the formulae. Experts bounded by capacity are
followed by the names of dims: constraints say where their slots turn from rows to experts and back.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Primitive
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from .._core.tracing import record_fact, recorded_facts
from .._core.types import Accumulate
from ..nn._constrain import constrain
from ..nn._overridable import Override, StepContext, use_overrides
from ._costs import EXPERTS, HEADS, LENGTH, PIPE
from ._space import How, Stages

OTHER_ROWS, OWN_EXPERTS = "plan: rows but for expert", "plan: experts"
"""Names of the slots' first two dims while each device has those of its own experts."""
_TURNED = (OTHER_ROWS, OWN_EXPERTS, None, None)
FORWARD, BACKWARD = "shardkit_attention", "shardkit_attention_gradient"
_LAYERS, _ATTENTION, _EXPERTS = "plan: layers", "plan: attention", "plan: number of experts"
_forward_p, _backward_p = Primitive(FORWARD), Primitive(BACKWARD)
_forward_p.multiple_results = _backward_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Marked:
    """What a loss marks, each kind once.

    Attributes:
      layers: number of layers of a `sk.nn.layer_stack`.
      attention: (length, heads, key heads) of a `sk.nn.attention`.
      experts: (number, whether bounded by capacity) of a `sk.nn.experts`.
      broken: why it cannot be said.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[tuple[int, int, int], ...] = ()
    experts: tuple[tuple[int, bool], ...] = ()
    broken: str = ""

    @classmethod
    def of(cls, jaxpr: Jaxpr) -> "Marked":
        """Reads what a loss recorded that was traced under `marking`."""
        facts: Any = (recorded_facts(jaxpr, kind) for kind in (_LAYERS, _ATTENTION, _EXPERTS))
        layers, attention, experts = facts
        return cls(tuple(n for (n,) in layers), attention, experts)

    def misses(self, sizes: Mapping[str, int]) -> str:
        """Why an axis has no part of the model to divide, or divides it unevenly; or nothing."""
        if self.broken:
            return self.broken
        stages = sizes.get(PIPE, 1)
        if stages > 1 and not self.layers:
            return f"the loss marks no layers with sk.nn.layer_stack, which {PIPE} would divide"
        if sizes.get(LENGTH, 1) > 1 and not self.attention:
            return f"the loss has no sk.nn.attention, which {LENGTH} would carry out"
        if sizes.get(EXPERTS, 1) > 1 and (why := self._no_experts(sizes)):
            return why
        uneven = [n for n in self.layers if stages > 1 and n % stages]
        return f"{uneven[0]} layers do not split evenly into {stages} stages" if uneven else ""

    def _no_experts(self, sizes: Mapping[str, int]) -> str:
        if not self.experts:
            return f"the loss has no sk.nn.experts, which {EXPERTS} would divide"
        if not all(bounded for _, bounded in self.experts):
            return "dropless experts, whose rows travel in numbers that only routers know"
        if max(sizes.get(PIPE, 1), sizes.get(LENGTH, 1)) > 1:
            return "experts beside a pipeline or a split length"
        ways = sizes[EXPERTS]
        uneven = [n for n, _ in self.experts if n % ways]
        return f"{uneven[0]} experts do not divide over {EXPERTS}={ways}" if uneven else ""

    def beside_experts(self, sizes: Mapping[str, int], how: How) -> str:
        """Why experts over an axis cannot be followed; or nothing."""
        return self._no_experts(sizes) or self.misfit(sizes, how, "")

    def misfit(self, sizes: Mapping[str, int], how: How, way: str) -> str:
        """Why layers cannot be scheduled so, or attention not look so; or nothing."""
        stages, context = sizes.get(PIPE, 1), sizes.get(LENGTH, 1)
        if isinstance(how, Stages):
            parts = stages * how.virtual_stages
            if any(n % parts for n in self.layers):
                return f"{self.layers[0]} layers do not split evenly into {parts} virtual stages"
            if how.schedule == "interleaved" and how.micro_batches % stages:
                return f"{how.micro_batches} micro-batches are no multiple of {stages} interleaved stages"
        if sizes.get(EXPERTS, 1) > 1 and isinstance(how, Accumulate):
            if how.micro_batches > 1 and how.reduce == "end":
                return "one reduction for all micro-batches beside experts"
        tensor = sizes.get(HEADS, 1)
        for length, heads, keys in self.attention if way else ():
            pieces = context * (2 if way == "ring" else 1)
            if length % pieces:
                return f"a length of {length} does not split into {pieces} pieces"
            if way == "ring" and stages > 1 and context % 2:
                return f"a ring of {context} inside a stage, whose devices meet in pairs"
            for number, what in ((heads, "heads"), (keys, "key heads")):
                if way == "all_to_all" and number % (tensor * context):
                    over = f"{LENGTH}={context} x {HEADS}={tensor}"
                    return f"{number} {what} do not split over {over}"
        return ""


def marking(attention: bool = True) -> AbstractContextManager[Any]:
    """Makes a loss record what it marks while it is traced, and say where slots of experts turn.

    Args:
      attention: whether attention is made one operation.
    """
    overrides: dict[str, Override] = {"experts": _Experts("plan")}
    if attention:
        overrides |= {"layer_stack": _Layers("plan"), "attention": _Attention("plan")}
    # Carriers are made use of on an axis of several devices alone.
    mesh: Any = AbstractMesh((2,), ("plan",), axis_types=(AxisType.Auto,))
    return use_overrides(overrides, StepContext(mesh, (), _unsplit))


def _unsplit(names: Any) -> PartitionSpec:
    return PartitionSpec()


class _Layers(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return record_fact(
            plain(*args, **kwargs), _LAYERS, len(jax.tree.leaves(kwargs["layers"])[0])
        )


class _Attention(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        q, k, v = args
        return record_fact(
            _attend(q, k, v, kwargs["causal"]), _ATTENTION, *q.shape[1:3], k.shape[2]
        )


class _Experts(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (x, choice, share, weights, mlp), capacity = args, kwargs["capacity"]

        def turned(weights: Any, h: jax.Array, dot: Any) -> jax.Array:
            h = constrain(constrain(h, "batch", None, None, None), *_TURNED)
            y = constrain(mlp(weights, h, dot), *_TURNED)
            return constrain(y, "batch", None, None, None)

        out = plain(
            x, choice, share, weights, mlp if capacity is None else turned, capacity=capacity
        )
        number = jax.tree.leaves(weights)[0].shape[0]
        return record_fact(out, _EXPERTS, number, capacity is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, causal: bool) -> jax.Array:
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, causal)[0]


def _attend_fwd(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, Any]:
    # Named as attention across devices names what it keeps.
    out, lse = checkpoint_name(tuple(_forward_p.bind(q, k, v, causal=causal)), "attn_mix")
    return out, (q, k, v, out, lse)


def _attend_bwd(causal: bool, saved: Any, g: jax.Array) -> Any:
    return tuple(_backward_p.bind(*saved, g, causal=causal))


_attend.defvjp(_attend_fwd, _attend_bwd)


@_forward_p.def_abstract_eval
def _forward_avals(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    return q.update(weak_type=False), q.update(shape=q.shape[:3], dtype=jnp.dtype("float32"))


@_backward_p.def_abstract_eval
def _backward_avals(q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any, *, causal: bool) -> Any:
    return q, k, v
