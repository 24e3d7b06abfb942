"""Traces of one update that differ in the sizes of its parameters."""

import functools
from collections.abc import Callable

import jax
from jax.extend import core
from jax.sharding import AxisType, Mesh

from ..._core.rewriting import inline_calls
from ..._core.types import Params, PyTree, Scalar
from ._parts import MatrixPart, find_parts

OwnersArgs = tuple[Params, PyTree, Params, Scalar]
Update = Callable[[Params, PyTree, Params, Scalar], tuple[Params, PyTree]]
Resize = Callable[[int, tuple[int, ...]], tuple[int, ...]]
"""`(number of a parameter, its shape) -> shape`."""


class RetraceError(Exception):
    """An update cannot be traced with other sizes of its parameters."""


class Retrace:
    """Traces an update with other sizes of its parameters."""

    def __init__(
        self, update: Update, init: Callable[[Params], PyTree], shapes: OwnersArgs, mesh: Mesh
    ) -> None:
        """Takes the update, what makes its state, and the abstract arguments of the update."""
        self._update, self._init, self._shapes, self._mesh = update, init, shapes, mesh
        grads, opt_state, params, _ = (len(jax.tree.leaves(tree)) for tree in shapes)
        # The number of the parameter that an argument is, or is the gradient of; else -1.
        self.numbers = [*range(grads), *[-1] * opt_state, *range(params), -1]

    def __call__(self, resize: Resize) -> core.ClosedJaxpr:
        """Traces the update of parameters of other sizes, without jitted functions inside."""
        try:
            return inline_calls(jax.make_jaxpr(self._update)(*self._resized(resize)))
        except Exception as error:  # a user's code, of sizes that it may not expect
            raise RetraceError from error

    def on_one_device(self, resize: Resize) -> core.ClosedJaxpr:
        """The same, for use inside of a `shard_map` over all axes: a trace names its mesh."""
        manual = (AxisType.Manual,) * len(self._mesh.axis_names)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh.update(axis_types=manual)):
            return self(resize)

    def find_parts(self, traced: core.ClosedJaxpr) -> list[MatrixPart]:
        """The parts of a trace that act on whole matrices."""
        params = [i for i, n in enumerate(self.numbers) if n >= 0]
        return find_parts(traced.jaxpr, self._followers, params)

    @functools.cached_property
    def _followers(self) -> list[bool]:
        """For each argument, whether its size follows that of a parameter."""
        resized = self._resized(lambda _, shape: tuple(2 * n for n in shape))
        pairs = zip(jax.tree.leaves(self._shapes), jax.tree.leaves(resized), strict=True)
        return [a.shape != b.shape for a, b in pairs]

    def _resized(self, resize: Resize) -> OwnersArgs:
        try:
            return self._sized(resize)
        except Exception as error:  # a user's init, of sizes that it may not expect
            raise RetraceError from error

    def _sized(self, resize: Resize) -> OwnersArgs:
        grads, opt_state, params, loss = self._shapes

        def of(tree: Params) -> Params:
            leaves = [
                jax.ShapeDtypeStruct(resize(i, x.shape), x.dtype, weak_type=x.weak_type)
                for i, x in enumerate(jax.tree.leaves(tree))
            ]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        shapes = jax.tree.leaves(jax.eval_shape(self._init, of(params)))
        declared = jax.tree.leaves(opt_state)
        state = [
            jax.ShapeDtypeStruct(new.shape, x.dtype, weak_type=x.weak_type)
            for new, x in zip(shapes, declared, strict=True)
        ]
        return of(grads), jax.tree.unflatten(jax.tree.structure(opt_state), state), of(params), loss
