"""What the model of a plan says of one step as declared, to hold against the compiled one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .._tree import short_dtype
from ..hardware import CHIPS
from ..step import StepSpec
from ._estimate import Machine, estimate
from ._found import PIPE
from ._network import Network
from ._placed import kept_bytes, placed_bytes
from ._space import Stages
from ._stages import estimate_stages
from ._trace import Model, walk_through

_FOLLOWED = ("data", "zero", "fsdp", "tensor", "tensor+sequence")
# Kinds whose exchanges are formulae, on the axis that these are written for.
_WAYS = {("context", "context"): "ring", ("context+all_to_all", "context"): "all_to_all"}
_STAGED, _EXPERTS = ("pipeline", PIPE), ("expert", "expert")
# Bytes are the same on every device; one has to be named, and its seconds are not used.
_ANY = Network(CHIPS["v5e"])


@dataclasses.dataclass(frozen=True)
class Modelled:
    """Figures of one device and step, modelled.

    Attributes:
      state: bytes of parameters, optimizer state, extra, counter and key; exact.
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
    used = [one for one in declared.strategy.kinds if sizes.get(one[1], 1) > 1]
    way = next((_WAYS[one] for one in used if one in _WAYS), "")
    how = _stages(declared) if _STAGED in used else declared.accumulate
    other = [
        f"{kind} over {axis}"
        for kind, axis in used
        if kind not in _FOLLOWED and (kind, axis) not in (*_WAYS, _STAGED, _EXPERTS)
    ]
    if other:
        raise NotImplementedError(f"{', '.join(other)} is not modelled")
    model = Model.of(declared)
    if _EXPERTS in used and (why := model.marked().beside_experts(sizes, how)):
        raise NotImplementedError(f"not modelled: {why}")
    layout = model.layout(sizes, declared.strategy, declared.accumulate.steps)
    flat = model.program(declared.strategy.remat, bool(way))
    walked = walk_through(flat, layout, declared.strategy, network.lanes if network else 1, way)
    machine = Machine(network or _ANY, short_dtype(jax.numpy.dtype(declared.precision.compute)))
    own = placed_bytes(layout)
    if isinstance(how, Stages):
        values, waits = estimate_stages(walked, [(sizes, how)], [own], machine)
        kept, waiting = 0, float(waits[0])
    else:
        values = estimate(walked, [(sizes, how)], machine, lanes=[own.lane])
        kept, waiting = kept_bytes(own, how), 0.0
    wire = {", ".join(name): float(v[0]) for name, v in values.wire.items() if v[0]}
    # What ZeRO updated in parts is gathered again.
    axes = tuple(axis for kind, axis in declared.strategy.kinds if kind == "zero")
    if own.refresh:
        wire[", ".join(axes)] = wire.get(", ".join(axes), 0.0) + own.refresh
    seconds = None
    if network:
        update = 2 * own.state / network.chip.memory_bandwidth
        refresh = own.refresh / float(network.rates([sizes], axes)[0])
        seconds = float(values.seconds(0.0)[0]) + waiting + update + refresh
    temp = float(values.temp[0]) + kept
    return Modelled(own.state, own.batch, temp, wire, seconds, walked.problems)


def _stages(declared: StepSpec) -> Stages:
    """The pipeline of a spec, whose micro-batches are all of its accumulation.

    Raises:
      NotImplementedError: it has others around them, or stages of different sizes.
    """
    carrier: Any = dict(declared.strategy.regions)["staged"]
    if declared.accumulate.steps > 1:
        raise NotImplementedError("micro-batches around those of a pipeline are not modelled")
    if carrier.layers_per_stage is not None:
        raise NotImplementedError("uneven stages are not modelled")
    return Stages(carrier.schedule, carrier.micro_batches, carrier.virtual_stages)
