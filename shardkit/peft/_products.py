"""Computes a loss with x W replaced by x W + scale · (x A) B, wherever it multiplies with W.

Adding A B to W before the loss would be simpler, but its backward pass computes and reduces the
gradient of W, as large as W. So the loss is traced, and the trace is evaluated again. A weight is
followed through casts, transposes, reshapes, slices, loops and layers under `jax.checkpoint` to
the products that it is in; everything else is computed as it was traced. What else happens to a
weight is an error.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from .._core.equations import bind, count_scan_operands, evaluate, inlined_program, user_line
from .._core.errors import Problem, StepError, raise_all
from .._core.types import PyTree
from ..nn._deferred import OpenCall, leaving_open, open_call_p
from ..nn._manual_axis_rules import on_shards, shard_offset
from ._dropout import MaskKey
from ._factors import AdaptedLeaf
from ._low_rank import multiply
from ._open_calls import PRODUCT, WeightForm, call_again
from ._tracked import MOVES, Tracked, split

Values = Sequence[Any]
Key = MaskKey | None

_REMAT = ("checkpoint", "remat2")
_DERIVED = ("custom_jvp_call", "custom_vjp_call")
_FOLD = "leave it out of sk.lora, or sk.lora(..., fold=True), which adds A B before the loss"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """What the adapter of a weight adds to a product, inside a derivative rule of the user's."""

    value: Any
    of: AdaptedLeaf = dataclasses.field(metadata={"static": True})


Adapted = Tracked | Delta


@dataclasses.dataclass(frozen=True)
class Products:
    """Evaluates a traced loss some of whose weights are `Tracked`."""

    dropout: float = 0.0  # probability that an element of an adapter's input is dropped
    # `{path: what the dims of the weight are in its products}`, filled while it runs
    dims: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    # what cannot be followed, filled while it runs
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def call(
        self, loss: Callable[..., PyTree], args: Values, weights: PyTree, key: jax.Array | None
    ) -> PyTree:
        """Calls a loss of pytrees of arrays, the first of them with `weights` in its place.

        These have a `Tracked` in place of each leaf that is adapted; `key` draws dropout, None for
        none. Raises StepError with every weight that cannot be followed to its products, or has
        none.
        """
        with leaving_open():
            traced, shapes = jax.make_jaxpr(loss, return_shape=True)(*args)
        flat = [*jax.tree.leaves(weights, is_leaf=_is_adapted), *jax.tree.leaves(args[1:])]
        results = [_plain(x) for x in self.run(traced, flat, key if key is None else MaskKey(key))]
        reached = {*self.dims, *(problem.subject for problem in self.problems)}
        for leaf in (x.of.leaf for x in flat if isinstance(x, Tracked)):
            if not reached & {leaf.path, str(leaf)}:
                why = "is multiplied with nothing in the loss: its adapter would have no effect"
                self.problems.append(Problem(str(leaf), why, "leave it out of sk.lora"))
        headline = "Adapters cannot be computed at the products of their weights."
        raise_all(StepError, headline, list(dict.fromkeys(self.problems)))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    def run(self, program: Any, args: Values, key: Key, *, deltas: bool = False) -> list[Any]:
        """Evaluates a program; with `deltas` a product is only what the adapter adds to it."""

        def compute(_: int, equation: core.JaxprEqn, values: list[Any]) -> Values:
            is_open = equation.primitive is open_call_p
            if not is_open and not any(map(_is_adapted, values)):
                return _bind(equation, values)
            return self._evaluate(equation, values, key, deltas)

        return evaluate(program, args, compute)

    def _evaluate(
        self, equation: core.JaxprEqn, values: list[Any], key: Key, deltas: bool
    ) -> Values:
        name, params = equation.primitive.name, equation.params
        if (inner := inlined_program(equation)) is not None:
            return self.run(inner, values, key, deltas=deltas)
        if name in _REMAT:
            options = {option: params[option] for option in ("policy", "prevent_cse")}
            run = functools.partial(self.run, params["jaxpr"], key=key, deltas=deltas)
            return jax.checkpoint(run, **options)(values)
        adapted = list(filter(_is_adapted, values))
        if name in (*MOVES, "split") and len(adapted) == 1 and _is_adapted(values[0]):
            return self._move(equation, values)
        if name == "dot_general" and len(adapted) == 1 and isinstance(adapted[0], Tracked):
            return self._multiply(equation, values, key, deltas)
        if name in _DERIVED and not deltas:
            return self._derived(equation, values, key)
        if name == "scan" and not deltas:
            return self._scan(equation, values, key)
        if name == "cond" and not deltas:
            return self._branch(equation, values, key)
        if equation.primitive is open_call_p:
            if deltas:
                self._refuse(equation, adapted)
                values = list(map(_plain, values))
            return self._call_open(equation, values, key)
        return self._refuse(equation, adapted) or _bind(equation, values)

    def _move(self, equation: core.JaxprEqn, values: list[Any]) -> Values:
        """What a weight, or what is added to a product, becomes by one operation."""
        first, *rest = values
        results = _bind(equation, values)
        if isinstance(first, Delta):
            return [dataclasses.replace(first, value=result) for result in results]
        if equation.primitive.name == "split":
            return split(first, equation.params, results)
        moved = MOVES[equation.primitive.name](first, equation.params, rest, results[0])
        return self._refuse(equation, [first]) or results if moved is None else [moved]

    def _derived(self, equation: core.JaxprEqn, values: list[Any], key: Key) -> Values:
        """A function with a derivative rule of its own, which holds for x W; A B has JAX's."""
        results = list(_bind(equation, values))
        added = self.run(equation.params["call_jaxpr"], values, key, deltas=True)
        for index, x in enumerate(added):
            if isinstance(x, Delta):
                results[index] = results[index] + x.value.astype(results[index].dtype)
            elif isinstance(x, Tracked):  # which the function only moved
                results[index] = dataclasses.replace(x, value=results[index])
        return results

    def _scan(self, equation: core.JaxprEqn, values: list[Any], key: Key) -> Values:
        fixed, carried = count_scan_operands(equation)
        consts, carry = values[:fixed], values[fixed : fixed + carried]
        slices = values[fixed + carried :]
        self._refuse(equation, list(filter(_is_adapted, carry)))
        for index, x in enumerate(slices):
            if isinstance(x, Tracked):
                stacked = self._check_dims(equation, x, dict.fromkeys(x.dims[0], "s"))
                slices[index] = x if stacked else x.value

        own = key and key.next("scan")

        def body(
            carry: list[Any], each: tuple[list[Any], jax.Array]
        ) -> tuple[list[Any], list[Any]]:
            sliced = [_drop_dim(x) if isinstance(x, Tracked) else x for x in each[0]]
            operands = [*consts, *carry, *sliced]
            results = self.run(equation.params["jaxpr"], operands, own and own.fold(each[1]))
            plain = self._leave(equation, results)
            return plain[:carried], plain[carried:]

        options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
        turns = jax.numpy.arange(options["length"])
        carry, stacked = jax.lax.scan(body, list(map(_plain, carry)), (slices, turns), **options)
        return [*carry, *stacked]

    def _branch(self, equation: core.JaxprEqn, values: list[Any], key: Key) -> Values:
        own = key and key.next("cond")

        def run(branch: Any, operands: list[Any]) -> list[Any]:
            return self._leave(equation, self.run(branch, operands, own and own.fold(0)))

        branches = [functools.partial(run, branch) for branch in equation.params["branches"]]
        return jax.lax.switch(values[0], branches, values[1:])

    def _call_open(self, equation: core.JaxprEqn, values: list[Any], key: Key) -> Values:
        """A part that a strategy may compute in its own way, or a product in such a part."""
        call: OpenCall = equation.params["call"]
        if call.name == PRODUCT:
            return self._multiply_rows(equation, values, key)
        self._refuse(equation, list(filter(_is_adapted, values[: len(call.closed)])))
        own = key and key.next(call.name)

        def evaluate(program: Any, values: list[Any], given: jax.Array | None) -> list[Any]:
            sliced = [
                self._take_layer(equation, x) if isinstance(x, Tracked) else x for x in values
            ]
            return self._leave(
                equation, self.run(program, sliced, own and MaskKey.of_function(given))
            )

        form = WeightForm(_is_adapted, _plain)
        return call_again(call, values, form, evaluate, own and own.key)

    def _take_layer(self, equation: core.JaxprEqn, weight: Tracked) -> Tracked:
        """A weight as a function of an open call gets it: of all layers, or of one."""
        if weight.value.ndim == len(weight.dims):
            return weight
        self._check_dims(equation, weight, dict.fromkeys(weight.dims[0], "s"))
        return _drop_dim(weight)

    def _multiply_rows(self, equation: core.JaxprEqn, values: list[Any], key: Key) -> Values:
        """A function that multiplies rows with the matrices w [experts, in, out] of their own."""
        x, weight = values[-2:]
        multiply_rows = equation.params["call"].call
        if not isinstance(weight, Tracked) or _is_adapted(x):
            self._refuse(equation, list(filter(_is_adapted, (x, weight))))
            return multiply_rows(_plain(x), _plain(weight))
        base, seen = multiply_rows(x, weight.value), dict[int, str]()
        for labels, letter in zip(weight.dims, "sio", strict=True):
            seen |= dict.fromkeys(labels, letter)
        rest = dict.fromkeys(range(len(weight.of.leaf.shape)), "s")
        if not self._check_dims(equation, weight, rest | seen) or weight.a is None:
            return base
        x = self._drop(equation, weight, x, key, [(x.ndim - 1, 1)])
        dtype = weight.value.dtype
        low = multiply_rows(x, weight.a.astype(dtype).squeeze(2))[0]
        b = weight.b.astype(dtype).squeeze(1).swapaxes(1, 2)
        delta = multiply_rows(low * weight.of.scale, b)[0]
        return [base[0] + delta.astype(base[0].dtype)]

    def _multiply(
        self, equation: core.JaxprEqn, values: list[Any], key: Key, deltas: bool
    ) -> Values:
        side = 0 if isinstance(values[0], Tracked) else 1
        weight, x = values[side], values[1 - side]
        contracted, batch = (dims[side] for dims in equation.params["dimension_numbers"])
        seen = {
            label: "i" if dim in contracted else "s" if dim in batch else "o"
            for dim, labels in enumerate(weight.dims)
            for label in labels
        }
        base = () if deltas else _bind(equation, values)
        rest = dict.fromkeys(range(len(weight.of.leaf.shape)), "s")
        if not self._check_dims(equation, weight, rest | seen) or weight.a is None:
            return base or _bind(equation, values)
        numbers = equation.params["dimension_numbers"][0]
        inputs = zip(numbers[1 - side], numbers[side], strict=True)
        x = self._drop(equation, weight, x, key, inputs)
        delta = multiply(weight, x, side, equation.params)
        return [base[0] + delta.astype(base[0].dtype)] if base else [Delta(delta, weight.of)]

    def _check_dims(self, equation: core.JaxprEqn, weight: Tracked, seen: dict[int, str]) -> bool:
        """Compares what dims of a weight are in one place with what they are declared as."""
        of, path = weight.of, weight.of.leaf.path
        every = len(seen) == len(of.leaf.shape)
        found = "".join(seen.get(dim, "?") for dim in range(len(of.leaf.shape)))
        if not of.dims:
            if every:
                self.dims.setdefault(path, set()).add(found)
            return True
        # A product with all stacked matrices at once has their dim among its own.
        fits = all(found == dim or (dim, found) == ("s", "o") for dim, found in _pairs(of, seen))
        if fits and every:
            self.dims.setdefault(path, set()).add(of.dims)
        elif not fits:
            why = f"has the dims {of.dims!r}, and in {_describe(equation)} they are {found!r}"
            fix = f'({of.rank}, "{found}") if all its products are so, else {_FOLD}'
            fix = fix if every else "an s for the dim that is scanned"
            self.problems.append(Problem(str(of.leaf), why, fix))
        return fits

    def _drop(
        self,
        equation: core.JaxprEqn,
        weight: Tracked,
        x: jax.Array,
        key: Key,
        inputs: Iterable[tuple[int, int]],
    ) -> jax.Array:
        """The input of an adapter, of floats; with a key some of its elements are dropped.

        `inputs` are the dims of x that are contracted, each with that of the weight.
        """
        if not jax.numpy.issubdtype(x.dtype, jax.numpy.inexact):
            x = x.astype(weight.value.dtype)  # x A has fractions
        if key is None:
            return x
        own = key.next(weight.of.leaf.path)
        if own.fits(x):
            return own.drop(x, self.dropout, self._find_cut(weight, inputs))
        why = f"is multiplied in {_describe(equation)} with other rows than its expert gets"
        self.problems.append(Problem(str(weight.of.leaf), why, "dot(rows, w); or dropout=0"))
        return x

    def _find_cut(
        self, weight: Tracked, inputs: Iterable[tuple[int, int]]
    ) -> dict[int, tuple[int, Any]]:
        """The dims of an input of which one device has a part, with their sizes and its start."""
        leaf, cut = weight.of.leaf, dict[int, tuple[int, Any]]()
        for at, dim in inputs if on_shards() else ():
            labels, size = weight.dims[dim], weight.value.shape[dim]
            names = [leaf.axes[label] for label in labels] if leaf.axes else []
            starts = [shard_offset(name, size) for name in names if name]
            start = next((x for x in starts if isinstance(x, jax.Array)), None)
            # A dim that is one of the parameter's starts on this device where that one does.
            here = [own for own in weight.dims if labels & own]
            if start is not None and len(labels) == len(here) == 1:
                cut[at] = leaf.shape[min(labels)], start
            elif start is not None:
                why = 'is split over devices in its products by mode="shard_map", where each '
                why += "device would drop other elements of its input than one device does"
                fix = 'mode="auto", or sk.lora(..., dropout=0)'
                self.problems.append(Problem(str(leaf), why, fix))
        return cut

    def _leave(self, equation: core.JaxprEqn, results: Values) -> list[Any]:
        """The results of a loop or a branch, which no weight leaves with its adapter."""
        self._refuse(equation, list(filter(_is_adapted, results)))
        return list(map(_plain, results))

    def _refuse(self, equation: core.JaxprEqn, adapted: list[Any]) -> None:
        why = f"goes into {_describe(equation)}, where A B cannot be kept apart"
        self.problems.extend(Problem(str(x.of.leaf), why, _FOLD) for x in adapted)


def _pairs(of: AdaptedLeaf, seen: dict[int, str]) -> list[tuple[str, str]]:
    return [(of.dims[dim], letter) for dim, letter in seen.items()]


def _bind(equation: core.JaxprEqn, values: Values) -> Values:
    return bind(equation, list(map(_plain, values)))


def _describe(equation: core.JaxprEqn) -> str:
    """`` `gather` (model.py:12 in loss: `table[ids]`) ``."""
    line, code = user_line(equation)
    return f"`{equation.primitive.name}`" + (f" ({line}: `{code}`)" if line else "")


def _drop_dim(weight: Tracked) -> Tracked:
    """A weight of one layer, which a scan has sliced."""
    return dataclasses.replace(weight, dims=weight.dims[1:])


def _is_adapted(x: Any) -> bool:
    return isinstance(x, Adapted)


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, Adapted) else x
