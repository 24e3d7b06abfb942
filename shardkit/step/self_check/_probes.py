"""What a self check does to parameters and gradients, on the devices and in their shardings.

Directions are never stored: element i of a leaf moves by +amount or -amount, the sign a hash of
(seed of the leaf, i). So a sharded leaf needs no random draw of its whole shape, the same signs
come out of every program, and nothing of the size of the parameters is kept beside the moved ones.

Every result but the moved trees is a few numbers per leaf, on every device the same: nothing large
reaches the host, whatever the number of processes.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..._core.alike import in_order, map_alike, stack_alike
from ..._core.precision import policy_dtype, widen
from ..._core.row_dims import map_rows
from ..._core.train_state import TrainState
from ..._core.tree import leaves_by_path
from ..._core.types import Batch, Params, Scalar
from ...checkpoint import fingerprint
from ...rules import axes_of
from .._layout import StepLayout
from .._program_cache import load_or_compile
from ..optim._extra_args import call_update

if TYPE_CHECKING:
    from .._program_cache import ProgramCache
    from .._saved_programs import SavedPrograms
    from .._spec import StepSpec

_MIX_1, _MIX_2, _STRIDE = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1


class Probes:
    """Small programs of one step, each compiled when it is first used."""

    def __init__(
        self,
        spec: "StepSpec",
        layout: StepLayout,
        policy: str | None,
        saved: "SavedPrograms | ProgramCache | None" = None,
    ) -> None:
        """Takes the optimizer, every sharding, the loss program's dtype policy, and a cache."""
        self._spec, self._layout, self._policy, self._saved = spec, layout, policy, saved
        self._mesh = jax.tree.leaves(layout.shardings)[0].mesh
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._partition = layout.partition
        # Path and type of each trained parameter, in JAX's order: L of them.
        self.paths = tuple(leaves_by_path(layout.partition.trained(layout.state.params), "params"))
        self._specs = [s.spec for s in jax.tree.leaves(layout.trained_shardings)]

    def _jit(self, run: Callable[..., Any], out_shardings: Any) -> Callable[..., Any]:
        """Jits a probe, whose arguments never change their types; takes it from the cache."""
        jitted = jax.jit(run, out_shardings=out_shardings)
        programs: list[jax.stages.Compiled] = []

        @functools.wraps(run)
        def call(*args: Any) -> Any:
            if not programs:
                programs.append(load_or_compile(jitted.lower(*args), self._mesh, self._saved))
            return programs[0](*args)

        return call

    @functools.cached_property
    def measure(self) -> Any:
        """`(params, gradients, u32[L]) → f32[3, L]`: rms of p, norm of g, ⟨g, signs⟩."""

        def run(params: Params, grads: Params, seeds: jax.Array) -> jax.Array:
            def of_leaf(p: jax.Array, g: jax.Array, seed: jax.Array) -> jax.Array:
                dot = jnp.sum(_real_product(widen(g), _signs(p, seed)))
                return jnp.stack([_norm(p) / np.sqrt(max(p.size, 1)), _norm(g), dot])

            columns = map(jax.tree.leaves, (self._partition.trained(params), grads))
            return map_alike(of_leaf, (*columns, seeds), self._specs).T

        return self._jit(run, self._whole)

    @functools.cached_property
    def move(self) -> Any:
        """`(params, u32[L], f32[L]) → params`, each element moved by ± the amount of its leaf."""

        def run(params: Params, seeds: jax.Array, amounts: jax.Array) -> Params:
            leaves, structure = jax.tree.flatten(self._partition.trained(params))
            moved = dict[int, jax.Array]()
            for stack in stack_alike((leaves, seeds, amounts), self._specs):
                # A loop: what `vmap` makes would be computed once more in the kernel of each leaf.
                rows = jax.lax.map(lambda row: _moved(*row), stack.columns)
                moved |= zip(stack.numbers, rows, strict=True)
            after = structure.unflatten(moved[number] for number in range(len(leaves)))
            return self._partition.merge(after, params)

        return self._jit(run, self._layout.shardings.params)

    @property
    def is_exact(self) -> bool:
        """Whether no element's move is lost in the rounding of parameters or of the loss."""
        trained = self._partition.trained(self._layout.state.params)
        own = [x.dtype for x in jax.tree.leaves(trained)]
        seen = [policy_dtype(dtype, self._policy) for dtype in own]
        return all(jnp.finfo(dtype).eps < 1e-6 for dtype in (*own, *seen))

    @functools.cached_property
    def predict(self) -> Any:
        """`(params, gradients, u32[L], f32[L]) → f32[L]`: what each leaf adds to L(p+v) - L(p-v).

        The difference is that of the rounded parameters, as the loss sees them: in bf16 an element
        moves by a multiple of its rounding, and by nothing where the move is smaller.
        """
        policy = self._policy

        def run(params: Params, grads: Params, seeds: jax.Array, amounts: jax.Array) -> jax.Array:
            def of_leaf(p: jax.Array, g: jax.Array, seed: jax.Array, amount: jax.Array) -> Any:
                up, down = (_rounded(_moved(p, seed, x), policy) for x in (amount, -amount))
                return jnp.sum(_real_product(widen(g), up - down))

            columns = map(jax.tree.leaves, (self._partition.trained(params), grads))
            return map_alike(of_leaf, (*columns, seeds, amounts), self._specs)

        return self._jit(run, self._whole)

    @functools.cached_property
    def rearrange(self) -> Any:
        """`(batch, i32[rows]) → batch` with these rows, laid out as declared."""

        def run(batch: Batch, index: jax.Array) -> Batch:
            dims = self._layout.row_dims
            return map_rows(lambda x, dim: jnp.take(x, index, axis=dim), batch, dims)

        return self._jit(run, self._layout.batch_shardings)

    @functools.cached_property
    def copy(self) -> Any:
        """`state → state` in buffers of its own, which a step may consume."""

        def fresh(x: jax.Array) -> jax.Array:
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                impl = jax.random.key_impl(x)
                return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(x)), impl=impl)
            return jnp.copy(x)

        def run(state: TrainState) -> TrainState:
            return jax.tree.map(fresh, state)

        return self._jit(run, self._layout.shardings)

    @functools.cached_property
    def copies_differ(self) -> Any:
        """`(state, gradients) → i32[leaves]`: devices whose copy of a shard is not the others'.

        On (data=2, tensor=2) a leaf split over tensor has two copies of each half; the checksums
        of the two are compared over data, and the disagreements summed over the whole mesh.
        """
        shardings = (self._layout.shardings, self._layout.trained_shardings)
        specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
        copied = [self._axes_of_copies(spec) for spec in specs]

        def on_device(*shards: jax.Array) -> jax.Array:
            stacks = list(stack_alike([shards], copied))
            found = [
                self._disagree(jax.vmap(fingerprint)(*stack.columns), stack.layout)
                for stack in stacks
            ]
            return in_order(stacks, found)

        def run(state: TrainState, grads: Params) -> jax.Array:
            flat = [_key_words(x) for x in jax.tree.leaves((state, grads))]
            body = jax.shard_map(
                on_device,
                mesh=self._mesh,
                in_specs=tuple(specs),
                out_specs=PartitionSpec(),
                # A dropped sum is what is looked for: the types must not be believed.
                check_vma=False,
            )
            return body(*flat)

        return self._jit(run, self._whole)

    def _axes_of_copies(self, spec: PartitionSpec) -> tuple[str, ...]:
        split = {axis for entry in spec for axis in axes_of(entry)}
        return tuple(axis for axis in self._mesh.axis_names if axis not in split)

    def _disagree(self, sums: jax.Array, copied: Any) -> jax.Array:
        """u32[n, 2] fingerprints of shards → i32[n] devices that have another one."""
        if not copied:
            return jnp.zeros(len(sums), jnp.int32)
        differs = (sums != jax.lax.pmax(sums, copied)).any(1)
        return jax.lax.psum(differs.astype(jnp.int32), self._mesh.axis_names)

    @functools.cached_property
    def update_gaps(self) -> Any:
        """`(before, gradients, loss, after, least) → f32[2, leaves of (params, opt_state)]`.

        Row 0 is the rms of what `after` differs by from `optimizer.update` of the gradients, row 1
        that of the change itself. Elements of parameters whose gradient is below `least` times the
        largest one are left out: Adam divides a gradient by its own size, so two correct programs
        may move an element in opposite directions where its gradient is zero but for rounding.
        Its first call raises LossAskedError if the optimizer evaluates the loss itself.
        """
        trained = self._layout.trained_shardings
        of_state = (trained, self._layout.shardings.opt_state)
        specs = [sharding.spec for sharding in jax.tree.leaves(of_state)]
        grad_specs = [sharding.spec for sharding in jax.tree.leaves(trained)]
        sizes = self._mesh.shape
        copies = [math.prod(sizes[a] for a in self._axes_of_copies(spec)) for spec in specs]
        shares = 1 / np.array(copies, "f")

        def on_device(flat: tuple[list[jax.Array], ...], least: Scalar) -> jax.Array:
            grads, before, expected, after = flat
            tops = [jnp.max(jnp.abs(g), initial=0).astype(jnp.float32) for g in grads]
            bound = least * jax.lax.pmax(jnp.max(jnp.stack(tops)), self._mesh.axis_names)
            sure = [jnp.abs(g).astype(jnp.float32) > bound for g in grads]
            every = [True] * (len(before) - len(sure))
            # Leaf by leaf: nothing of the expected state is kept. See `_core/alike.py`.
            gaps = map(_squared_gaps, before, expected, after, [*sure, *every])
            return jax.lax.psum(shares * jnp.stack(list(gaps), 1), self._mesh.axis_names)

        def run(
            before: TrainState, grads: Params, loss: Scalar, after: TrainState, least: Scalar
        ) -> jax.Array:
            start, end = map(self._partition.trained, (before.params, after.params))
            args = grads, before.opt_state, start, loss
            updates, opt_state = call_update(self._spec.optimizer, *args)
            params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), start, updates)
            states = ((start, before.opt_state), (params, opt_state), (end, after.opt_state))
            body = jax.shard_map(
                on_device,
                mesh=self._mesh,
                in_specs=((grad_specs, specs, specs, specs), PartitionSpec()),
                out_specs=PartitionSpec(),
                check_vma=False,  # copies are compared by `copies_differ`
            )
            flat = tuple(
                [_key_words(x) for x in jax.tree.leaves(tree)] for tree in (grads, *states)
            )
            gaps, changes, wants = jnp.sqrt(body(flat, least))
            expected = jax.tree.leaves(states[1])
            roundings = np.array([100 * _epsilon(x.dtype) for x in expected], "f") * wants
            result = jnp.stack([gaps, jnp.maximum(changes, roundings)])
            return (result / np.sqrt([max(x.size, 1) for x in expected])).astype(jnp.float32)

        return self._jit(run, self._whole)

    @functools.cached_property
    def updated_paths(self) -> tuple[str, ...]:
        """Paths of the leaves of `update_gaps`."""
        state = self._layout.state
        return (*self.paths, *leaves_by_path(state.opt_state, "opt_state"))

    @functools.cached_property
    def copied_paths(self) -> tuple[str, ...]:
        """Paths of the leaves of `copies_differ`."""
        state = self._layout.state
        gradients = self._partition.trained(state.params)
        return (*leaves_by_path(state, "state"), *leaves_by_path(gradients, "gradients"))


def _squared_gaps(before: Any, expected: Any, after: Any, sure: Any) -> jax.Array:
    """[3] squared sums: of after - expected, of the change, and of what is expected.

    A leaf of integers that is not as expected is wrong by 1, where the change is 1.
    """
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        wrong = jnp.any(after != expected).astype(jnp.float32)
        return jnp.stack([wrong, jnp.float32(1), jnp.float32(0)])
    old, want, got = (widen(jnp.where(sure, x, 0)) for x in (before, expected, after))
    return jnp.stack([_squares(got - want), _squares(want - old), _squares(want)])


def _epsilon(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _moved(p: jax.Array, seed: jax.Array, amount: jax.Array) -> jax.Array:
    return (widen(p) + amount * _signs(p, seed)).astype(p.dtype)


def _rounded(x: jax.Array, policy: str | None) -> jax.Array:
    """`x` rounded to its own dtype and to that of the loss, but held in f32 at least.

    A pair of casts may be dropped by the compiler; `reduce_precision` may not.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x
    wide = widen(x)
    for to in (x.dtype, policy_dtype(x.dtype, policy)):
        if to.itemsize < wide.dtype.itemsize:
            info = jnp.finfo(to)
            wide = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
    return wide


def _signs(x: jax.Array, seed: jax.Array) -> jax.Array:
    """±1 for each element, ±1±i for a complex one: a hash of its global row-major index."""
    signs = _hash_signs(x.shape, seed)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return signs + 1j * _hash_signs(x.shape, seed ^ np.uint32(_STRIDE))
    return signs.astype(widen(x).dtype)


def _hash_signs(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    for dim, n in enumerate(shape):
        index = index * np.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    word = index * np.uint32(_STRIDE) ^ seed
    word = (word ^ (word >> 16)) * np.uint32(_MIX_1)
    word = (word ^ (word >> 13)) * np.uint32(_MIX_2)
    return 1.0 - 2.0 * ((word ^ (word >> 16)) >> 31).astype(jnp.float32)


def _real_product(g: jax.Array, d: jax.Array) -> jax.Array:
    """What a move d adds to the loss, by JAX's convention of complex gradients: Re(g·d)."""
    return jnp.real(g * d)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(_squares(widen(x))).astype(jnp.float32)


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(x)))


def _key_words(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
