"""Estimates one step as declared, to compare with the compiled one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from .._core.tree import short_dtype
from ..hardware import CHIPS
from ..parallel import Kind, known_kinds
from ..step import StepSpec
from ._cases import PlannedCase, estimate_cases
from ._estimate import Machine
from ._network import Network
from ._space import Batching, PipelineOptions
from ._state_bytes import count_state_bytes
from ._trace import TracedModel, propagate_step

# Bytes are the same on every chip; one has to be named, and its seconds are not used.
_ANY_NETWORK = Network(CHIPS["v5e"])


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Modelled figures of one device and step."""

    state: int  # bytes of parameters, optimizer state, model_state, counter and key; exact
    batch: int  # bytes of its share of the batch; exact
    temp: float  # bytes of activations, gradients and scratch
    wire: Mapping[str, float]  # mesh axes, joined by commas → bytes sent
    seconds: float | None  # of a step; None where no links were given
    problems: tuple[str, ...] = ()  # what could not be costed; with any, figures are lower bounds

    @property
    def total(self) -> float:
        """Bytes alive at once."""
        return self.state + self.batch + self.temp


def estimate_step(
    spec: StepSpec, sizes: Mapping[str, int], network: Network | None = None
) -> StepEstimate:
    """Estimates one declared step, with its own strategy, accumulation and remat.

    Args:
      spec: the step.
      sizes: size of each mesh axis.
      network: links and chip, for the time; without it only bytes are estimated.

    Raises:
      NotImplementedError: the model does not cover a kind, an axis or an option of the strategy.
      ShardingError: the layout is not legal.

    >>> import jax.numpy as jnp, optax, shardkit as sk
    >>> spec = sk.StepSpec(
    ...     loss_fn=lambda w, x, key: jnp.mean((x @ w) ** 2), optimizer=optax.sgd(0.1),
    ...     init=lambda key: jnp.zeros((64, 64)), batch=jax.ShapeDtypeStruct((8, 64), "float32"),
    ...     strategy=sk.strategies.data())
    >>> estimated = estimate_step(spec, {"data": 4})
    >>> estimated.batch, estimated.wire  # 2 · 3/4 of the gradients and of the loss
    (512, {'data': 24582.0})
    """
    kinds = [kind for kind in spec.strategy.kinds if sizes.get(kind.axis, 1) > 1]
    attention = next(
        (kind.plan_choice.attention for kind in kinds if kind.plan_choice.attention), ""
    )
    model = TracedModel.of(spec)
    batching = _check_modelled(spec, model, kinds, sizes)
    layout = model.layout(sizes, spec.strategy, spec.accumulate.micro_batches)
    costs = propagate_step(
        model.program(spec.strategy.remat, bool(attention)),
        layout,
        spec.strategy,
        tile_width=network.tile_width if network else 1,
        attention=attention,
    )
    dtype = short_dtype(jax.numpy.dtype(model.compute_dtype))
    machine = Machine(network or _ANY_NETWORK, dtype)
    exact = count_state_bytes(layout, spec.strategy)
    case = PlannedCase(sizes, batching, attention=attention, state_bytes=exact)
    (estimated,) = estimate_cases(costs, spec.strategy.remat, [case], machine)
    return StepEstimate(
        state=exact.state,
        batch=exact.batch,
        temp=estimated.temp,
        wire=estimated.wire,
        seconds=estimated.seconds if network else None,
        problems=costs.problems,
    )


def _check_modelled(
    spec: StepSpec, model: TracedModel, kinds: Sequence[Kind], sizes: Mapping[str, int]
) -> Batching:
    """Returns a spec's batching; raises NotImplementedError for the first kind not modelled."""
    # Kinds that override regions have formulae, and these are written for one axis.
    covered = {(kind.name, kind.axis) for kind in known_kinds()}
    other = [
        f"{kind} over {kind.axis}"
        for kind in kinds
        if kind.unmodelled_reason or (kind.override and (kind.name, kind.axis) not in covered)
    ]
    if other:
        raise NotImplementedError(f"{', '.join(other)} is not modelled")
    staged = any("layers" in kind.splits for kind in kinds)
    batching = _pipeline_of(spec) if staged else spec.accumulate
    if any("experts" in kind.splits for kind in kinds):
        if problem := model.regions().expert_problem(sizes, batching):
            raise NotImplementedError(f"not modelled: {problem}")
    return batching


def _pipeline_of(spec: StepSpec) -> PipelineOptions:
    """The pipeline of a spec, whose micro-batches are all of its accumulation.

    Micro-batches around those of the pipeline, or uneven stages, raise a NotImplementedError.
    """
    override: Any = dict(spec.strategy.overrides)["layer_stack"]
    if spec.accumulate.micro_batches > 1:
        raise NotImplementedError("micro-batches around those of a pipeline are not modelled")
    if override.layers_per_stage is not None:
        raise NotImplementedError("uneven stages are not modelled")
    return PipelineOptions(override.schedule, override.micro_batches, override.virtual_stages)
