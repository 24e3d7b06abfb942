"""What the model of a plan says of one step as declared, to hold against the compiled one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .._core.tree import short_dtype
from ..hardware import CHIPS
from ..parallel import known_kinds
from ..step import StepSpec
from ._estimate import Machine, estimate
from ._network import Network
from ._space import Stages
from ._stages import estimate_stages
from ._state_bytes import kept_bytes, placed_bytes
from ._trace import Model, walk_through

# Bytes are the same on every device; one has to be named, and its seconds are not used.
_ANY = Network(CHIPS["v5e"])


@dataclasses.dataclass(frozen=True)
class Modelled:
    """Figures of one device and step, modelled.

    Attributes:
      state: bytes of parameters, optimizer state, model_state, counter and key; exact.
      batch: bytes of its share of the batch; exact.
      temp: bytes of activations, gradients and scratch.
      wire: mesh axes, joined by commas → bytes sent.
      seconds: of a step; None where no links were given.
      problems: what could not be costed; with any, figures are lower bounds.
    """

    state: int
    batch: int
    temp: float
    wire: Mapping[str, float]
    seconds: float | None
    problems: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes alive at once."""
        return self.state + self.batch + self.temp


def modelled(
    declared: StepSpec, sizes: Mapping[str, int], network: Network | None = None
) -> Modelled:
    """Estimates one declared step, with its own strategy, accumulation and remat.

    Args:
      declared: the spec of a step.
      sizes: size of each mesh axis.
      network: links and chip that its time is modelled for.

    Raises:
      NotImplementedError: the strategy lays something out in a way that the model cannot follow.
      ShardingError: the layout is not legal.

    >>> import jax.numpy as jnp, optax, shardkit as sk
    >>> one = sk.StepSpec(
    ...     loss_fn=lambda w, x, key: jnp.mean((x @ w) ** 2), optimizer=optax.sgd(0.1),
    ...     init=lambda key: jnp.zeros((64, 64)), batch=jax.ShapeDtypeStruct((8, 64), "float32"),
    ...     strategy=sk.strategies.data())
    >>> found = modelled(one, {"data": 4})
    >>> found.batch, found.wire  # 2 · 3/4 of the gradients and of the loss
    (512, {'data': 24582.0})
    """
    used = [kind for kind in declared.strategy.kinds if sizes.get(kind.axis, 1) > 1]
    way = next((kind.plan_choice.attention for kind in used if kind.plan_choice.attention), "")
    # What needs a region has formulae, and these are written for one axis.
    written = {(kind.name, kind.axis) for kind in known_kinds()}
    other = [
        f"{kind} over {kind.axis}"
        for kind in used
        if kind.unmodelled_reason or (kind.override and (kind.name, kind.axis) not in written)
    ]
    if other:
        raise NotImplementedError(f"{', '.join(other)} is not modelled")
    staged = any("layers" in kind.splits for kind in used)
    how = _stages(declared) if staged else declared.accumulate
    model = Model.of(declared)
    experts = any("experts" in kind.splits for kind in used)
    if experts and (why := model.marked().beside_experts(sizes, how)):
        raise NotImplementedError(f"not modelled: {why}")
    layout = model.layout(sizes, declared.strategy, declared.accumulate.micro_batches)
    flat = model.program(declared.strategy.remat, bool(way))
    walked = walk_through(flat, layout, declared.strategy, network.lanes if network else 1, way)
    machine = Machine(
        network or _ANY, short_dtype(jax.numpy.dtype(declared.precision.compute_dtype))
    )
    own = placed_bytes(layout, declared.strategy.kinds)
    if isinstance(how, Stages):
        values, waits = estimate_stages(walked, [(sizes, how)], [own], machine)
        kept, waiting = 0, float(waits[0])
    else:
        values = estimate(walked, [(sizes, how)], machine, lanes=[own.lane])
        kept, waiting = kept_bytes(own, how), 0.0
    wire = {", ".join(name): float(v[0]) for name, v in values.wire.items() if v[0]}
    beside = dict(own.sent_beside(sizes))
    for axis, sent in beside.items():
        wire[axis] = wire.get(axis, 0.0) + sent
    seconds = None
    if network:
        update = 2 * own.state / network.chip.memory_bandwidth
        again = sum(n / float(network.rates([sizes], [axis])[0]) for axis, n in beside.items())
        seconds = float(values.seconds(0.0)[0]) + waiting + update + again
    temp = float(values.temp[0]) + kept
    return Modelled(own.state, own.batch, temp, wire, seconds, walked.problems)


def _stages(declared: StepSpec) -> Stages:
    """The pipeline of a spec, whose micro-batches are all of its accumulation.

    Raises:
      NotImplementedError: it has others around them, or stages of different sizes.
    """
    override: Any = dict(declared.strategy.overrides)["layer_stack"]
    if declared.accumulate.micro_batches > 1:
        raise NotImplementedError("micro-batches around those of a pipeline are not modelled")
    if override.layers_per_stage is not None:
        raise NotImplementedError("uneven stages are not modelled")
    return Stages(override.schedule, override.micro_batches, override.virtual_stages)
