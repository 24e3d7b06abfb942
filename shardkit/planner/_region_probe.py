"""The regions that a model marks for strategies to override, as a plan sees them.

Attention over a split length is not an array program that propagation can follow by axis names:
blocks of keys travel between devices. So where a length is to be split, `sk.nn.attention` is traced
as one operation forward and one backward, whose costs are formulae. Experts bounded by capacity are
followed by axis names: constraints mark where their slots change from rows to experts and back.
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
from ..nn._constrain import constrain
from ..nn._overridable import Override, StepContext, use_overrides
from ._costs import EXPERTS, HEADS, LENGTH, PIPE
from ._space import Batching, PipelineOptions

ROWS, ROWS_WITHOUT_EXPERT, LOCAL_EXPERTS = "plan: rows", "plan: rows less expert", "plan: experts"
"""Names of the slots' first dim, and of the first two while each device holds the slots of its own
experts."""
_EXPERT_SLOTS = (ROWS_WITHOUT_EXPERT, LOCAL_EXPERTS, None, None)
ATTENTION_FORWARD, ATTENTION_BACKWARD = "shardkit_attention", "shardkit_attention_gradient"
_LAYERS, _ATTENTION, _EXPERTS = "plan: layers", "plan: attention", "plan: number of experts"
_forward_p, _backward_p = Primitive(ATTENTION_FORWARD), Primitive(ATTENTION_BACKWARD)
_forward_p.multiple_results = _backward_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class MarkedRegions:
    """Regions that a loss marks, each distinct one once."""

    layers: tuple[int, ...] = ()  # number of layers of a `sk.nn.layer_stack`
    # (length, heads, key heads) of a `sk.nn.attention`
    attention: tuple[tuple[int, int, int], ...] = ()
    # (number, whether bounded by capacity) of a `sk.nn.experts`
    experts: tuple[tuple[int, bool], ...] = ()
    error: str = ""  # why the loss could not be traced

    @classmethod
    def of(cls, jaxpr: Jaxpr) -> "MarkedRegions":
        """Reads the facts that a loss recorded, traced under `probe_regions`."""
        facts: Any = (recorded_facts(jaxpr, kind) for kind in (_LAYERS, _ATTENTION, _EXPERTS))
        layers, attention, experts = facts
        return cls(tuple(n for (n,) in layers), attention, experts)

    def axis_problem(self, sizes: Mapping[str, int]) -> str:
        """Why an axis has no part of the model to divide, or divides it unevenly; "" if it does."""
        if self.error:
            return self.error
        stages = sizes.get(PIPE, 1)
        if stages > 1 and not self.layers:
            return f"the loss marks no layers with sk.nn.layer_stack, which {PIPE} would divide"
        if sizes.get(LENGTH, 1) > 1 and not self.attention:
            return f"the loss has no sk.nn.attention, which {LENGTH} would divide"
        if sizes.get(EXPERTS, 1) > 1 and (why := self._expert_axis_problem(sizes)):
            return why
        uneven = [n for n in self.layers if stages > 1 and n % stages]
        return f"{uneven[0]} layers do not split evenly into {stages} stages" if uneven else ""

    def _expert_axis_problem(self, sizes: Mapping[str, int]) -> str:
        if not self.experts:
            return f"the loss has no sk.nn.experts, which {EXPERTS} would divide"
        if not all(bounded for _, bounded in self.experts):
            return "dropless experts, whose number of rows is known only to the router"
        if max(sizes.get(PIPE, 1), sizes.get(LENGTH, 1)) > 1:
            return "experts beside a pipeline or a split length"
        shards = sizes[EXPERTS]
        uneven = [n for n, _ in self.experts if n % shards]
        return f"{uneven[0]} experts do not divide over {EXPERTS}={shards}" if uneven else ""

    def expert_problem(self, sizes: Mapping[str, int], batching: Batching) -> str:
        """Why experts over an axis cannot be followed; "" if they can."""
        return self._expert_axis_problem(sizes) or self.option_problem(sizes, batching, "")

    def option_problem(self, sizes: Mapping[str, int], batching: Batching, attention: str) -> str:
        """Why a mesh does not admit a batching or a method of attention; "" if it does."""
        if isinstance(batching, PipelineOptions):
            if problem := self._pipeline_problem(sizes.get(PIPE, 1), batching):
                return problem
        elif sizes.get(EXPERTS, 1) > 1 and batching.micro_batches > 1 and batching.reduce == "end":
            return "one reduction for all micro-batches beside experts"
        return self._attention_problem(sizes, attention) if attention else ""

    def _pipeline_problem(self, stages: int, pipeline: PipelineOptions) -> str:
        parts = stages * pipeline.virtual_stages
        if any(n % parts for n in self.layers):
            return f"{self.layers[0]} layers do not split evenly into {parts} virtual stages"
        if pipeline.schedule == "interleaved" and pipeline.micro_batches % stages:
            what = f"{pipeline.micro_batches} micro-batches"
            return f"{what} are not a multiple of {stages} interleaved stages"
        return ""

    def _attention_problem(self, sizes: Mapping[str, int], method: str) -> str:
        context, tensor = sizes.get(LENGTH, 1), sizes.get(HEADS, 1)
        ring = method == "ring"
        for length, heads, keys in self.attention:
            pieces = context * (2 if ring else 1)
            if length % pieces:
                return f"a length of {length} does not split into {pieces} pieces"
            if ring and sizes.get(PIPE, 1) > 1 and context % 2:
                return f"a ring of {context} inside a stage, whose devices exchange in pairs"
            for number, what in ((heads, "heads"), (keys, "key heads")):
                if not ring and number % (tensor * context):
                    over = f"{LENGTH}={context} x {HEADS}={tensor}"
                    return f"{number} {what} do not split over {over}"
        return ""


def probe_regions(attention: bool = True) -> AbstractContextManager[Any]:
    """Makes a loss record its regions while it is traced, and mark where experts' slots change.

    Attention is then traced as one operation, if asked for.
    """
    overrides: dict[str, Override] = {"experts": _ExpertProbe("plan")}
    if attention:
        overrides |= {"layer_stack": _LayerProbe("plan"), "attention": _AttentionProbe("plan")}
    # Overrides take effect only on an axis of several devices.
    mesh: Any = AbstractMesh((2,), ("plan",), axis_types=(AxisType.Auto,))
    return use_overrides(overrides, StepContext(mesh, (), lambda names: PartitionSpec()))


class _LayerProbe(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return record_fact(
            plain(*args, **kwargs), _LAYERS, len(jax.tree.leaves(kwargs["layers"])[0])
        )


class _AttentionProbe(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        q, k, v = args
        sizes = (*q.shape[1:3], k.shape[2])
        return record_fact(_attend(q, k, v, kwargs["causal"]), _ATTENTION, *sizes)


class _ExpertProbe(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        (x, choice, share, weights, mlp), capacity = args, kwargs["capacity"]

        def mark_slots(weights: Any, h: jax.Array, *dot_and_keys: Any) -> jax.Array:
            h = constrain(constrain(h, ROWS, None, None, None), *_EXPERT_SLOTS)
            y = constrain(mlp(weights, h, *dot_and_keys), *_EXPERT_SLOTS)
            return constrain(y, ROWS, None, None, None)

        marked = mlp if capacity is None else mark_slots
        out = plain(x, choice, share, weights, marked, **kwargs)
        number = jax.tree.leaves(weights)[0].shape[0]
        return record_fact(out, _EXPERTS, number, capacity is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, causal: bool) -> jax.Array:
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, causal)[0]


def _attend_fwd(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, Any]:
    # The name under which attention across devices saves its output.
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
