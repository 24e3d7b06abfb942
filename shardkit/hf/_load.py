"""`load`: the weights of a Hugging Face folder, read slice by slice onto the devices of a mesh."""

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from .._core.errors import CheckpointError, Problem, did_you_mean, raise_all
from .._core.io._files import local_path
from .._core.options import check_arguments
from .._core.tree import leaves_by_path
from .._core.types import Key, Params
from ..checkpoint._collective_errors import collective_errors
from ..checkpoint._match import DROP, FRESH, SAVED
from ..checkpoint._restore import RestoreRequest
from ..rules import matches
from ..step import StepSpec, resolve_layout
from ..step._bound_spec import BoundSpec
from ._adapters import adapter_problems, draw_adapters, list_adapters
from ._config import find_family
from ._table import (
    LeafSource,
    Table,
    assign,
    count_uses,
    find_sources,
    keeps_values,
    padding_problems,
)
from ._tensor_files import StoredTensor, read_folder


def load(
    path: str | os.PathLike[str],
    spec: StepSpec,
    mesh: Mesh,
    *,
    table: Table | None = None,
    vocab_padding: int = 0,
    partial: Mapping[str, str] | None = None,
    fresh: Any = None,
    cast: Sequence[str] = (),
    key: Key | None = None,
) -> Params:
    """Reads the weights of a folder into the layout of a step.

    Each device reads only its slices, from mapped files. The host holds one shard at a time beside
    the result. Several processes make the call together, and fail together.

        model = shardkit.lm.decoder_model(sk.hf.decoder_config(folder))
        spec = sk.StepSpec(loss_fn=model.loss_fn, init=model.init, ...)
        params = sk.hf.load(folder, spec, mesh)
        state = spec.compile(mesh).init(jax.random.key(0), params=params)

    The adapters of `sk.lora` are not in the folder: `key` draws them, and them alone.

    Args:
      path: a folder with `config.json` and safetensors files.
      spec: the step whose parameters are read; of the reference decoder, or any with a table.
      mesh: the devices.
      table: `{leaf: (tensors, pattern)}` in place of that of the family that `config.json` names;
        see `shardkit.hf.Table`.
      vocab_padding: rows of the tables that no token has, `DecoderConfig.vocab_padding`; zeros.
      partial: `{glob: "saved", "fresh" or "drop"}` over paths of leaves and names of tensors, the
        first match wins: leaves that come from `fresh`, tensors that are not wanted. None: all are
        saved.
      fresh: pytree with the leaves that are fresh, or a function that returns it:
        `step.init(key).params`.
      cast: globs of leaves whose floats may be rounded. Without a cast a 16-bit tensor becomes an
        f32 leaf, which keeps its value, and nothing is rounded.
      key: typed PRNG key that draws the adapters that `partial` does not name; they are those that
        `step.init(key)` has.

    Returns:
      The parameters, with the spec's shardings.

    Raises:
      CheckpointError: the folder cannot be read; or with every tensor that is missing, extra, or
        of another shape or dtype, before any array is made; or a finite value would become
        infinite by a cast.
      ConfigError: the family in `config.json` is unknown.
      ShardingError: the parameters cannot be laid out on the mesh.
    """
    headline = "Weights cannot be loaded."
    check_arguments(
        CheckpointError,
        headline,
        spec=(spec, StepSpec),
        mesh=(mesh, Mesh),
        vocab_padding=(vocab_padding, int),
        cast=(cast, Sequence[str]),
        partial=(partial, Mapping[str, str] | None),
    )
    raise_all(CheckpointError, headline, padding_problems(vocab_padding))
    with collective_errors():
        folder = local_path(path, CheckpointError, headline)
        tensors = read_folder(folder)
        stored = tuple(tensors)
        layout = resolve_layout(spec, BoundSpec(spec, mesh).mesh)
        abstract, shardings = layout.state.params, layout.shardings.params
        wanted = leaves_by_path(abstract)
        whose = "the names in table="
        if table is None:
            whose, family = "the DecoderConfig of sk.hf.decoder_config(folder)", find_family(folder)
            table, tensors = family.named_like(tensors), family.parameters(tensors, wanted)
        rules = partial or {}
        adapters = list_adapters(spec, wanted, rules)
        fresh_paths = [name for name in wanted if _find_source(name, rules) == FRESH]
        fresh_paths += adapters
        sources, problems = find_sources(table, wanted, vocab_padding)
        problems = [problem for problem in problems if problem.subject not in fresh_paths]
        problems += adapter_problems(adapters, key)
        problems += _dead_globs(rules, cast, tuple(wanted), stored)
        problems += _find_problems(sources, tensors, fresh_paths, rules, cast)
        fix = f"{whose}, or partial={{...}}"
        raise_all(CheckpointError, f"{folder} does not fit the parameters.", problems, fix)
    named = [name for name in fresh_paths if name not in adapters]
    leaves = RestoreRequest(abstract, shardings, fresh=fresh).fresh_leaves(named)
    by_path = leaves_by_path(shardings)
    if key is not None and adapters:
        leaves |= draw_adapters(spec, mesh, {name: by_path[name] for name in adapters}, key)
    with collective_errors():
        for name, source in sources.items():
            if name not in leaves:
                leaves[name] = _read_leaf(source, tensors, by_path[name])
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


def _find_source(name: str, rules: Mapping[str, str]) -> str:
    return next((source for glob, source in rules.items() if matches(glob, name)), SAVED)


def _dead_globs(
    rules: Mapping[str, str], cast: Sequence[str], leaves: Sequence[str], tensors: Sequence[str]
) -> list[Problem]:
    """Globs that decide nothing."""
    names = (*leaves, *tensors)
    winners = {next((glob for glob in rules if matches(glob, name)), None) for name in names}
    problems = []
    for subject, glob, known in (
        *((f"partial[{glob!r}]", glob, names) for glob in rules),
        *((f"cast: {glob!r}", glob, leaves) for glob in cast),
    ):
        if not any(matches(glob, name) for name in known):
            why = f"decides nothing: it matches no name.{did_you_mean(glob, known)}"
            problems.append(Problem(subject, why, "correct or remove it"))
        elif known is names and glob not in winners:
            why = "decides nothing: a glob before it matches all that it does"
            problems.append(Problem(subject, why, "name it before the wider one"))
    return problems


def _find_problems(
    sources: Mapping[str, LeafSource],
    tensors: Mapping[str, StoredTensor],
    fresh: Sequence[str],
    rules: Mapping[str, str],
    cast: Sequence[str],
) -> list[Problem]:
    """Lists the tensors that are missing, extra, or not of the shape or dtype of their leaf."""
    known = (SAVED, FRESH, DROP)
    problems = [
        Problem(f"partial[{glob!r}]", f"{source!r} is not in {known}")
        for glob, source in rules.items()
        if source not in known
    ]
    used = {name for source in sources.values() for name in source.names.values()}
    unused = {name: tensor for name, tensor in tensors.items() if name not in used}
    for source in sources.values():
        if source.path in fresh:
            continue
        if _find_source(source.path, rules) == DROP:
            problems.append(Problem(source.path, "is a parameter: only tensors are dropped"))
        problems += source.find_problems(tensors, unused)
        problems += [
            Problem(name, f"is dropped in partial, and {source.type} needs it")
            for name in dict.fromkeys(source.names.values())
            if _find_source(name, rules) == DROP
        ]
        may_round = any(matches(glob, source.path) for glob in cast)
        for name in dict.fromkeys(source.names.values()):
            if name in tensors and not keeps_values(tensors[name].dtype, source.dtype, may_round):
                why = f"is {tensors[name].type}, which {source.type} would round"
                problems.append(Problem(name, why, f"load(..., cast=[{source.path!r}])"))
    problems += [
        Problem(name, f"is {tensor.type}, and no parameter is made of it")
        for name, tensor in unused.items()
        if _find_source(name, rules) == SAVED
    ]
    problems += [
        Problem(name, f"is {tensors[name].type}, and only {share} of it becomes parameters")
        for name, (share, _) in count_uses(sources).items()
        if share < 1 and name in tensors and _find_source(name, rules) == SAVED
    ]
    return problems


def _read_leaf(
    source: LeafSource, tensors: Mapping[str, StoredTensor], sharding: Sharding
) -> jax.Array:
    """Reads a leaf shard by shard; each is on its devices before the next is read."""
    shape, on_devices = source.shape, list[jax.Array]()
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices.setdefault(box, []).append(device)
    for box, holders in devices.items():
        shard = _zeros([stop - start for start, stop in box], source.dtype)
        for name, part, at in source.pieces(tuple(slice(*bounds) for bounds in box)):
            assign(shard, at, source.view(tensors[name].map())[part], name)
        on_devices += [jax.block_until_ready(jax.device_put(shard, d)) for d in holders]
        del shard  # before the next one is allocated
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns zeros in pages of their own, which go back to the system when they are deleted."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).view(dtype).reshape(shape)
