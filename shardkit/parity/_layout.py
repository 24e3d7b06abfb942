"""Where leaves should live, resolved anew from the rules, and where live arrays do."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.tree import join_path, leaves_by_path, list_leaves, path_str
from .._core.types import Variables, WithAxes
from ..parallel import update_specs
from ..rules import first_match, format_spec, resolve_all
from ..step import FollowParams, StepSpec
from ._parity_report import format_error
from ._record import to_host

Specs = dict[str, PartitionSpec]


def declared_specs(spec: StepSpec, mesh: Mesh, state: Any) -> Specs:
    """Resolves the rules of a spec for every leaf of a state and of its batch.

    Args:
      spec: rules and batch.
      mesh: the device mesh.
      state: the `TrainState`, of which only paths, shapes and dtypes are read.

    Returns:
      Specs by `params/…`, `opt_state/…`, `model_state/…`, `batch/…`, `step`, `key` and `halted`.
    """
    strategy, sizes = spec.strategy, dict(mesh.shape)
    params = list_leaves(state.params, _axis_names(spec))
    specs, problems = resolve_all(strategy.params, params, sizes)
    moments = list_leaves(state.opt_state)
    updated = update_specs(strategy.zero, params, specs, sizes)
    pairs = tuple((leaf, updated[leaf.path]) for leaf in params)
    follow = FollowParams(pairs, frozenset(leaf.path for leaf in moments))
    rule = first_match(strategy.opt_state, follow) if strategy.opt_state else follow
    opt_state, more = resolve_all(rule, moments, sizes)
    model_state, rest = resolve_all(strategy.model_state, list_leaves(state.model_state), sizes)
    lost = [*problems, *more, *rest]
    assert not lost, "a step was compiled from rules that do not resolve"
    found = {
        "params": specs,
        "opt_state": opt_state,
        "model_state": model_state,
        "batch": _batch_specs(spec, sizes),
    }
    named = {join_path(part, path): s for part, by in found.items() for path, s in by.items()}
    return {**dict.fromkeys(("step", "key", "halted"), PartitionSpec()), **named}


def _batch_specs(spec: StepSpec, sizes: dict[str, int]) -> Specs:
    of, batch = list_leaves(spec.batch), spec.strategy.batch
    if isinstance(batch, PartitionSpec):
        return {leaf.path: PartitionSpec(*tuple(batch)[: len(leaf.shape)]) for leaf in of}
    return resolve_all(batch, of, sizes)[0]


def _axis_names(spec: StepSpec) -> dict[str, tuple[str | None, ...]]:
    """Logical axes that `init` named, by path."""

    def named(x: Any) -> bool:
        return isinstance(x, WithAxes)

    made = jax.eval_shape(spec.init, jax.eval_shape(lambda: jax.random.key(0)))
    params = made.params if isinstance(made, Variables) else made
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=named)
    return {path_str(path): x.axes for path, x in found if named(x)}


def misplaced(tree: Any, specs: Specs, mesh: Mesh, when: str) -> Iterator[tuple[str, str]]:
    """Leaves of which some device holds another part than declared, as (path, why).

    Args:
      tree: live arrays; paths are those of `specs`.
      specs: from `declared_specs`.
      mesh: the device mesh.
      when: of what time the arrays are, for the message.
    """
    for name, x in leaves_by_path(tree).items():
        want = NamedSharding(mesh, specs[name]).devices_indices_map(x.shape)
        held = {shard.device: shard for shard in x.addressable_shards}
        if any(
            device not in held or _bounds(held[device].index, x.shape) != _bounds(index, x.shape)
            for device, index in want.items()
            if device.process_index == jax.process_index()
        ):
            found = getattr(x.sharding, "spec", None)
            lives = f"lives as {format_spec(found)}" if found is not None else f"is {x.sharding}"
            yield name, f"{when} {lives}, the rules say {format_spec(specs[name])}"


def differing_copies(tree: Any) -> Iterator[tuple[str, str]]:
    """Leaves of which two devices hold the same part with different bits, as (path, why)."""
    for path, x in leaves_by_path(tree).items():
        first: dict[Any, Any] = {}
        for shard in x.addressable_shards:
            part = _bounds(shard.index, x.shape)
            mine = to_host(shard.data)
            other = first.setdefault(part, (shard.device, mine))
            if other[1].tobytes() != mine.tobytes():
                gap = np.abs(other[1].astype(np.float64) - mine.astype(np.float64)).max()
                both = f"devices {other[0].id} and {shard.device.id}"
                why = f"{both} hold copies {format_error(gap)} apart"
                yield path, why
                break


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    # The shard of a typed key has one more slice, over the words that hold it.
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=False))
