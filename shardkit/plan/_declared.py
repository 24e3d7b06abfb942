"""What the model of a plan says of one step as declared, to hold against the compiled one."""

import dataclasses
from collections.abc import Mapping

import jax

from .._tree import short_dtype
from ..hardware import CHIPS
from ..step import Declaration
from ._estimate import Machine, estimate
from ._network import Network
from ._placed import kept_bytes, placed_bytes
from ._trace import Model, walk_through

_FOLLOWED = ("data", "zero", "fsdp", "tensor", "tensor+sequence")
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
    declared: Declaration, sizes: Mapping[str, int], network: Network | None = None
) -> Modelled:
    """Estimates one declared step, with its own strategy, accumulation and remat.

    Args:
      declared: a step; its mesh is not looked at.
      sizes: size of each mesh axis.
      network: links and chip that its time is modelled for.

    Raises:
      NotImplementedError: the strategy lays something out in a way that the model cannot follow.
      ShardingError: the layout is not legal.

    >>> import jax.numpy as jnp, optax, shardkit as sk
    >>> one = sk.Declaration(
    ...     loss_fn=lambda w, x, key: jnp.mean((x @ w) ** 2), optimizer=optax.sgd(0.1),
    ...     init=lambda key: jnp.zeros((64, 64)), batch=jax.ShapeDtypeStruct((8, 64), "float32"),
    ...     mesh=sk.MeshSpec(data=4), strategy=sk.strategies.data())
    >>> found = modelled(one, {"data": 4})
    >>> found.batch, found.wire  # 2 · 3/4 of the gradients and of the loss
    (512, {'data': 24582.0})
    """
    used = {axis for axis, n in sizes.items() if n > 1}
    other = [f"{kind} over {axis}" for kind, axis in declared.strategy.kinds if axis in used]
    other = [text for text in other if text.split(" over ")[0] not in _FOLLOWED]
    if other:
        raise NotImplementedError(f"{', '.join(other)} is not modelled")
    model, how = Model.of(declared), declared.accumulate
    layout = model.layout(sizes, declared.strategy, how.steps)
    flat, lanes = model.program(declared.strategy.remat), network.lanes if network else 1
    walked = walk_through(flat, layout, declared.strategy, lanes)
    machine = Machine(network or _ANY, short_dtype(jax.numpy.dtype(declared.precision.compute)))
    own = placed_bytes(layout)
    values = estimate(walked, [(sizes, how)], machine, lanes=[own.lane])
    wire = {", ".join(name): float(v[0]) for name, v in values.wire.items() if v[0]}
    # What ZeRO updated in parts is gathered again.
    axes = tuple(axis for kind, axis in declared.strategy.kinds if kind == "zero")
    if own.refresh:
        wire[", ".join(axes)] = wire.get(", ".join(axes), 0.0) + own.refresh
    seconds = None
    if network:
        update = 2 * own.state / network.chip.memory_bandwidth
        refresh = own.refresh / float(network.rates([sizes], axes)[0])
        seconds = float(values.seconds(0.0)[0]) + update + refresh
    temp = float(values.temp[0]) + kept_bytes(own, how)
    return Modelled(own.state, own.batch, temp, wire, seconds, walked.problems)
