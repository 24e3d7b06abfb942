"""A declared loss, differentiated and flat, and how its arguments lie under a strategy."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType

from .._core.precision import cast_floats
from ..nn._remat import apply_policy, parse_policy, use_policy
from ..parallel import Strategy
from ..rules import axes_of
from ..step import Abstract, Layout, StepSpec, abstract_state, objective, resolve_layout
from ._dataflow import Dims, named_sizes
from ._program import Flat, flatten
from ._propagator import Walk
from ._region_probe import OTHER_ROWS, OWN_EXPERTS, Marked, marking
from ._symbolic_sharding import MICRO, Axes, Laid, Terms, of_spec, whole


@dataclasses.dataclass(frozen=True)
class Model:
    """What a spec says without a mesh, traced once.

    Attributes:
      declared: loss, optimizer, init, batch, precision.
      abstract: the state's shapes and the parameters' logical axes.
      programs: what was traced already.
    """

    declared: StepSpec
    abstract: Abstract
    programs: dict[tuple[str, bool], Flat] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, declared: StepSpec) -> "Model":
        """Traces `init` and the optimizer."""
        return cls(
            declared, abstract_state(declared.init, declared.optimizer, declared.precision, 0)
        )

    def of_length(self, lengths: Container[int], factor: float) -> "Model | None":
        """The same model for rows of another length.

        Args:
          lengths: sizes of the dims that the model names `length`.
          factor: by which dims of the batch of these sizes, but for its rows, are to grow.

        Returns:
          The model; None where the batch has no such dim.
        """

        def resized(x: Any) -> Any:
            dims = (int(n * factor) if n in lengths else n for n in x.shape[1:])
            return jax.ShapeDtypeStruct((*x.shape[:1], *dims), x.dtype)

        batch = jax.tree.map(resized, self.declared.batch)
        shapes = [[x.shape for x in jax.tree.leaves(b)] for b in (batch, self.declared.batch)]
        if shapes[0] == shapes[1]:
            return None
        declared = self.declared.replace(batch=batch)
        return dataclasses.replace(self, declared=declared, programs={})

    def layout(self, sizes: Mapping[str, int], strategy: Strategy, steps: int = 1) -> Layout:
        """Resolves every rule of a strategy on a mesh of these sizes.

        Raises:
          ShardingError: with everything that does not fit.
        """
        d = self.declared
        return resolve_layout(
            d.init,
            d.optimizer,
            d.batch,
            abstract_mesh(sizes),
            strategy,
            d.precision,
            steps,
            abstract=self.abstract,
        )

    def program(self, remat: str, marked: bool = False) -> Flat:
        """The gradient of the loss under a remat policy, for the whole batch at once.

        Args:
          remat: the policy.
          marked: whether attention is one operation, as where its length is split.
        """
        if (remat, marked) not in self.programs:
            with marking(attention=marked):
                self.programs[remat, marked] = flatten(self.jaxpr(remat))
        return self.programs[remat, marked]

    def marked(self) -> Marked:
        """What the loss marks for strategies to carry out."""
        d, (state, _) = self.declared, self.abstract
        low = jax.eval_shape(lambda p: cast_floats(p, d.precision.compute_dtype), state.params)
        with marking():
            loss = jax.make_jaxpr(objective(d.loss_fn))(low, state.model_state, d.batch, state.key)
        return Marked.of(loss.jaxpr)

    def jaxpr(self, remat: str) -> ClosedJaxpr:
        """The same as JAX traces it."""
        d, (state, _) = self.declared, self.abstract
        loss, named = objective(d.loss_fn), parse_policy(remat)
        low = jax.eval_shape(lambda p: cast_floats(p, d.precision.compute_dtype), state.params)

        def run(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
            params = cast_floats(params, d.precision.compute_dtype)
            return jax.grad(chosen, has_aux=True)(params, model_state, batch, key)

        chosen = apply_policy(loss, named, low, state.model_state, d.batch, state.key)
        with use_policy(named):
            return jax.make_jaxpr(run)(state.params, state.model_state, d.batch, state.key)


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """A mesh of sizes alone, all axes of type Auto."""
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@dataclasses.dataclass(frozen=True)
class Walked:
    """What a walk found.

    Attributes:
      walk: see `Walk`.
      points: the different sums of bytes alive at an operation.
      problems: what could not be costed.
      lengths: sizes of the dims that the model names `length`.
    """

    walk: Walk
    points: list[Terms]
    problems: tuple[str, ...]
    lengths: frozenset[int]


def walk_through(
    flat: Flat, layout: Layout, strategy: Strategy, lanes: int = 1, way: str = ""
) -> Walked:
    """Walks through a traced gradient under a strategy, for any size of its axes.

    Args:
      flat: the program.
      layout: how its arguments and gradients lie.
      strategy: names activations' axes.
      lanes: see `Walk`.
      way: how attention looks along a split length.
    """
    state, placed = layout.state, layout.shardings
    ins = _laid(placed.params, state.params, stored=True)
    wanted: list[Dims | None] = [one.dims for one in _laid(layout.gradients, state.params)]
    ins += _laid(placed.model_state, state.model_state)
    ins += [_in_micro_batches(one) for one in _laid(layout.batch_shardings, layout.batch)]
    ins += [whole(0)]
    walk = Walk(_resolver(strategy), lanes, way)
    wants = [*wanted, *[None] * (len(flat.outputs) - len(wanted))]
    _, alive = walk.run(flat, ins, wants)
    points = [dict(point) for point in {frozenset(p.items()) for p in alive}]
    return Walked(walk, points, flat.problems, named_sizes(flat, "length"))


def _laid(shardings: Any, arrays: Any, stored: bool = False) -> list[Laid]:
    pairs = zip(jax.tree.leaves(shardings), jax.tree.leaves(arrays), strict=True)
    return [of_spec(sharding.spec, len(x.shape), stored=stored) for sharding, x in pairs]


def _in_micro_batches(laid: Laid) -> Laid:
    """Rows are split into micro-batches first."""
    return laid.with_dims(((MICRO, *laid.dims[0]), *laid.dims[1:]) if laid.dims else ())


def _resolver(strategy: Strategy) -> Callable[..., Dims]:
    table = strategy.activations
    moving = {kind.axis for kind in strategy.kinds if "experts" in kind.splits}

    def resolve(names: tuple[str | None, ...], shape: tuple[int, ...]) -> Dims:
        if table is None:
            return ((),) * len(names)
        known = ({OTHER_ROWS: "batch", OWN_EXPERTS: None}.get(n or "", n) for n in names)
        dims: list[Axes] = [axes_of(entry) for entry in table.spec(tuple(known))]
        dims += [()] * (len(shape) - len(dims))
        if OWN_EXPERTS in names:
            rows, *rest = dims
            own = tuple(axis for axis in rows if axis in moving)
            dims = [tuple(axis for axis in rows if axis not in moving), own, *rest[1:]]
        return tuple(dims)

    return resolve
