"""Where the rules put each leaf, resolved anew, and where the live arrays are."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.train_state import TrainState
from .._core.tree import join_path, leaves_by_path, list_leaves, path_str
from .._core.types import PyTree, Variables, has_axes
from ..parallel import update_specs
from ..rules import first_match, format_spec, resolve_all
from ..step import FollowParams, StepSpec, around_init, arrange_specs
from ._parity_report import format_error
from ._record import copy_leaf_to_host

Specs = dict[str, PartitionSpec]


def resolve_declared_specs(spec: StepSpec, mesh: Mesh, state: TrainState) -> Specs:
    """Resolves the rules of a spec for every leaf of a state and of its batch.

    Of the state only paths, shapes and dtypes are read. Returns specs by `params/…`, `opt_state/…`,
    `model_state/…`, `batch/…`, `step`, `key` and `halted`.
    """
    strategy, sizes = spec.strategy, dict(mesh.shape)
    with around_init(mesh):
        params = list_leaves(state.params, _collect_axis_names(spec))
    moments = list_leaves(state.opt_state)
    param_specs, param_problems = resolve_all(strategy.params, params, sizes, follows=spec.follows)
    updated_specs = update_specs(strategy.zero, params, param_specs, sizes)
    pairs = tuple((leaf, updated_specs[leaf.path]) for leaf in params)
    follow = FollowParams(pairs, frozenset(leaf.path for leaf in moments))
    rule = first_match(strategy.opt_state, follow) if strategy.opt_state else follow
    opt_specs, opt_problems = resolve_all(rule, moments, sizes)
    model_specs, model_problems = resolve_all(
        strategy.model_state, list_leaves(state.model_state), sizes
    )
    problems = [*param_problems, *opt_problems, *model_problems]
    assert not problems, "a step was compiled from rules that do not resolve"
    parts = {
        "params": param_specs,
        "opt_state": opt_specs,
        "model_state": model_specs,
        "batch": _resolve_batch_specs(spec, sizes),
    }
    return {
        **dict.fromkeys(("step", "key", "halted"), PartitionSpec()),
        **{join_path(part, path): s for part, specs in parts.items() for path, s in specs.items()},
    }


def _resolve_batch_specs(spec: StepSpec, sizes: dict[str, int]) -> Specs:
    batch_leaves, rule = list_leaves(spec.batch), spec.strategy.batch
    if isinstance(rule, PartitionSpec):
        return arrange_specs(rule, batch_leaves, spec.row_dims)
    return resolve_all(rule, batch_leaves, sizes)[0]


def _collect_axis_names(spec: StepSpec) -> dict[str, tuple[str | None, ...]]:
    """Logical axes that `init` declares, by path."""
    variables = jax.eval_shape(spec.init, jax.eval_shape(lambda: jax.random.key(0)))
    params = variables.params if isinstance(variables, Variables) else variables
    paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=has_axes)
    return {path_str(path): x.axes for path, x in paths if has_axes(x)}


def find_misplaced_leaves(
    tree: PyTree, specs: Specs, mesh: Mesh, when: str
) -> Iterator[tuple[str, str]]:
    """Yields (path, why) of each live array with a shard that is not where its spec puts it.

    The message says `when` the arrays were read.
    """
    process = jax.process_index()
    for path, x in leaves_by_path(tree).items():
        expected = NamedSharding(mesh, specs[path]).devices_indices_map(x.shape)
        actual = {shard.device: shard.index for shard in x.addressable_shards}
        if any(
            device not in actual
            or _index_bounds(actual[device], x.shape) != _index_bounds(index, x.shape)
            for device, index in expected.items()
            if device.process_index == process
        ):
            spec = getattr(x.sharding, "spec", None)
            layout = f"is laid out as {format_spec(spec)}" if spec is not None else f"{x.sharding}"
            yield path, f"{when} {layout}, the rules say {format_spec(specs[path])}"


def find_differing_copies(tree: PyTree) -> Iterator[tuple[str, str]]:
    """Yields (path, why) of each leaf of which two devices hold one shard with different bits."""
    for path, x in leaves_by_path(tree).items():
        first_copies: dict[Any, tuple[Any, np.ndarray]] = {}
        for shard in x.addressable_shards:
            copy = copy_leaf_to_host(shard.data)
            bounds = _index_bounds(shard.index, x.shape)
            device, first = first_copies.setdefault(bounds, (shard.device, copy))
            if first.tobytes() != copy.tobytes():
                gap = np.abs(first.astype(np.float64) - copy.astype(np.float64)).max()
                devices = f"devices {device.id} and {shard.device.id}"
                yield path, f"{devices} hold copies {format_error(gap)} apart"
                break


def _index_bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """`(start, stop)` of each dim, so that `slice(None)` and `slice(0, 8)` of 8 are equal."""
    # A shard of a typed key has one more slice than dims, over the words of the key's data.
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=False))
