"""Adapters alone as PEFT writes them: `adapter_model.safetensors` and `adapter_config.json`.

A stacked weight is one module per matrix there, and a factor with several input or output dims is
a matrix:

    query [layers, embed, heads, head_dim]
    a     [layers, embed, rank]               lora_A.weight [rank, embed] of each layer
    b     [layers, rank, heads, head_dim]     lora_B.weight [heads·head_dim, rank]
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .._core.errors import CheckpointError, Problem, did_you_mean, raise_all
from .._core.io import local_path, os_errors_as, write_atomic
from .._core.tree import short_type
from ..checkpoint import export_safetensors, open_safetensors
from ..checkpoint._collective_errors import collective_errors, is_first_process
from ._factors import AdaptedLeaf

# (path of a weight, index of a matrix in stacked ones) -> name of its module.
Names = Callable[[str, tuple[int, ...]], str]
Factors = dict[str, dict[str, Any]]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CONFIG_BYTES = 2**20
_LARGEST = 2**53  # a rank or an alpha
# A name as a regular expression: without repetitions, so that it is compared in one pass.
_NAME = re.compile(r"\^?(?:[^\\^$*+?{}\[\]|()]|\\\W)+")
_NOT_READ, _NOT_SAVED = "The adapter cannot be loaded.", "The adapter was not saved."
# Settings of PEFT that are read, or change no number that an adapter in a file computes.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "qalora_group_size"),
)
# Weights of embeddings and heads, which PEFT by default saves beside their adapters.
_OWN_WEIGHTS = (".base_layer.weight", ".embed_tokens.weight", ".wte.weight", ".lm_head.weight")
_WITHOUT_WEIGHTS = "PEFT's save_pretrained(..., save_embedding_layers=False), if it was not trained"
# Values that switch any other setting off, and those by which an adapter starts on plain weights.
_OFF = (None, False, [], {})
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def module_names(path: str, index: tuple[int, ...]) -> str:
    """The path with dots, without a last `kernel` or `weight`, and the index behind.

    >>> module_names("layers/query/kernel", (3,))
    'layers.query.3'
    """
    *parents, last = path.split("/")
    parts = parents if parents and last in ("kernel", "weight") else [*parents, last]
    return ".".join([*parts, *map(str, index)])


def write_adapter(
    folder: str | os.PathLike[str],
    adapted: Sequence[AdaptedLeaf],
    factors: Factors,
    names: Names,
    config: Mapping[str, Any],
) -> None:
    """Writes the two files; see `LoraModel.save`."""
    target = local_path(folder, CheckpointError, _NOT_SAVED)
    # Adapters are small, and a stacked one is many matrices: the first process writes them all.
    with collective_errors():
        modules = name_modules(adapted, names, _NOT_SAVED)
        if is_first_process():
            existing = [p for p in (target / _WEIGHTS, target / _CONFIG) if p.exists()]
            problems = [Problem(str(path), "exists already", "another folder") for path in existing]
            raise_all(CheckpointError, _NOT_SAVED, problems)
    tensors = {}
    for one in adapted:
        for name, value in factors[one.leaf.path].items():
            whole = _gather(value)
            if is_first_process():
                named = (_tensor_name(module, name) for module in modules[one.leaf.path])
                tensors |= zip(named, _matrices(one, name, whole), strict=True)
    with collective_errors():
        if is_first_process():
            _write_files(target, tensors, _describe(adapted, modules, config))


def _gather(value: Any) -> Any:
    """The whole of an array of which each process has a part; each of them makes the call."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return value


def _write_files(
    target: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes both files or none."""
    text = json.dumps(config, indent=2) + "\n"
    with os_errors_as(CheckpointError, _NOT_SAVED, target, "a folder that can be written"):
        target.mkdir(parents=True, exist_ok=True)
        export_safetensors(target / _WEIGHTS, tensors, {"format": "pt"})
        try:
            with write_atomic(target / _CONFIG) as temporary:
                temporary.write_text(text)
        except BaseException:
            (target / _WEIGHTS).unlink()
            raise


def read_adapter(
    folder: str | os.PathLike[str], adapted: Sequence[AdaptedLeaf], like: Factors, names: Names
) -> Factors:
    """Reads the two files; see `LoraModel.load`."""
    with collective_errors():
        return _read_files(folder, adapted, like, names)


def _read_files(
    folder: str | os.PathLike[str], adapted: Sequence[AdaptedLeaf], like: Factors, names: Names
) -> Factors:
    source = local_path(folder, CheckpointError, _NOT_READ)
    modules = name_modules(adapted, names, _NOT_READ)
    odd = [p for p in (source / _WEIGHTS, source / _CONFIG) if p.exists() and not p.is_file()]
    raise_all(CheckpointError, _NOT_READ, [Problem(str(p), "is no regular file") for p in odd])
    config = _read_config(source / _CONFIG)
    with open_safetensors(source / _WEIGHTS) as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}
        problems = [*_config_problems(config, adapted, modules)]
        problems += _tensor_problems(tensors, adapted, modules)
        raise_all(CheckpointError, _NOT_READ, problems, "the adapter that sk.lora declares")

        def read(one: AdaptedLeaf, name: str, target: Any) -> jax.Array:
            found = [tensors[_tensor_name(m, name)][:] for m in modules[one.leaf.path]]
            whole = _stack(one, name, found).astype(target.dtype)
            return jax.make_array_from_callback(
                whole.shape, target.sharding, lambda index: whole[index]
            )

        return {
            one.leaf.path: {name: read(one, name, x) for name, x in like[one.leaf.path].items()}
            for one in adapted
        }


def name_modules(
    adapted: Sequence[AdaptedLeaf], names: Names, headline: str
) -> dict[str, list[str]]:
    """`{path: names of the modules}`, one for each matrix in row-major order.

    Raises CheckpointError if two matrices have one name.
    """
    modules = {
        one.leaf.path: [
            names(one.leaf.path, tuple(map(int, index)))
            for index in np.ndindex(*(one.leaf.shape[dim] for dim in one.having("s")))
        ]
        for one in adapted
    }
    owners: dict[str, str] = {}
    problems = []
    for path, own in modules.items():
        for module in own:
            if module in owners:
                why = f"is the name of a matrix of {owners[module]} and of one of {path}"
                problems.append(Problem(repr(module), why, "names=, with a name for each"))
            owners[module] = path
    raise_all(CheckpointError, headline, problems)
    return modules


def _tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor.upper()}.weight"


def _matrix_shape(one: AdaptedLeaf, factor: str) -> tuple[int, int]:
    return (one.rank, one.size("i")) if factor == "a" else (one.size("o"), one.rank)


def _matrices(one: AdaptedLeaf, factor: str, value: Any) -> Iterator[np.ndarray]:
    """The matrices of a factor as PEFT has them: the output in front."""
    columns, rows = _matrix_shape(one, factor)
    for matrix in np.asarray(value).reshape(-1, rows, columns):
        yield np.ascontiguousarray(matrix.T)


def _stack(one: AdaptedLeaf, factor: str, matrices: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([matrix.T for matrix in matrices]).reshape(one.shape(factor))


def _describe(
    adapted: Sequence[AdaptedLeaf], modules: Mapping[str, Sequence[str]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The config: the rank and alpha of the first module, and those of others by name."""
    root = config["use_rslora"]
    rank = {m: one.rank for one in adapted for m in modules[one.leaf.path]}
    alpha = {
        m: one.scale * (one.rank**0.5 if root else one.rank)
        for one in adapted
        for m in modules[one.leaf.path]
    }
    first = next(iter(rank))
    return {
        "peft_type": "LORA",
        "r": rank[first],
        "lora_alpha": alpha[first],
        "rank_pattern": {_exact(m): n for m, n in rank.items() if n != rank[first]},
        "alpha_pattern": {_exact(m): n for m, n in alpha.items() if n != alpha[first]},
        "target_modules": sorted(rank),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **config,
    }


def _exact(module: str) -> str:
    """The key of one module; without ^ it would also be that of each whose name it ends."""
    return f"^{re.escape(module)}"


def _read_config(path: Path) -> dict[str, Any]:
    with os_errors_as(CheckpointError, _NOT_READ, path, "the folder of an adapter"):
        with path.open("rb") as file:
            text = file.read(_CONFIG_BYTES + 1)
    try:
        config = json.loads(text) if len(text) <= _CONFIG_BYTES else None
    except (ValueError, RecursionError):
        config = None
    if isinstance(config, dict):
        return config
    problem = Problem(str(path), "is not a JSON object of at most 1 MiB", "a file that PEFT wrote")
    raise_all(CheckpointError, _NOT_READ, [problem])
    raise AssertionError


def _config_problems(
    config: Mapping[str, Any], adapted: Sequence[AdaptedLeaf], modules: Mapping[str, Sequence[str]]
) -> Iterator[Problem]:
    """Settings with which the file's adapters compute other numbers than these."""
    if config.get("peft_type") != "LORA":
        yield Problem("peft_type", f"is {config.get('peft_type')!r}, not 'LORA'")
    for name, value in config.items():
        if name not in _KNOWN and value not in _PLAIN.get(name, _OFF):
            why = f"is {value!r}, which is not known to leave x W + scale · (x A) B as it is"
            yield Problem(name, why, "merge the adapter into its model with PEFT")
    odd = [*_pattern_problems(config)]
    yield from odd
    for one in () if odd else adapted:
        for module in modules[one.leaf.path]:
            rank = _setting(config, "rank_pattern", "r", module)
            alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
            if rank is None or alpha is None or rank <= 0:
                yield Problem(module, "has no numbers as its r and lora_alpha")
                break
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            if not np.isclose(scale, one.scale, rtol=1e-6):
                why = f"has scale {scale:g} in the file and {one.scale:g} here"
                yield Problem(module, why, f"sk.lora(..., alpha={{{one.leaf.path!r}: {alpha:g}}})")
                break


def _setting(config: Mapping[str, Any], table: str, default: str, module: str) -> Any:
    """A number of a module: that of the first key in a table that matches it, else the default."""
    entries = (config.get(table) or {}).items()
    # As PEFT compares them.
    matched = (value for key, value in entries if re.match(rf"(.*\.)?({key})$", module))
    found = next(matched, config.get(default))
    if not isinstance(found, int | float) or isinstance(found, bool):
        return None
    return found if abs(found) < _LARGEST else None


def _pattern_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys by module that are regular expressions of more than one name: they may never end."""
    for table in ("rank_pattern", "alpha_pattern"):
        entries = config.get(table) or {}
        if not isinstance(entries, dict):
            yield Problem(table, f"is {entries!r}, not numbers by module")
            continue
        for key in entries:
            if not _NAME.fullmatch(key):
                why = f"has {key!r}, a regular expression: names with or without ^ are read"
                yield Problem(table, why, "one key for each module")


def _tensor_problems(
    tensors: Mapping[str, Any], adapted: Sequence[AdaptedLeaf], modules: Mapping[str, Sequence[str]]
) -> Iterator[Problem]:
    """Tensors that are missing, extra, of another shape, or no floating-point numbers."""
    wanted = {
        _tensor_name(module, factor): _matrix_shape(one, factor)
        for one in adapted
        for module in modules[one.leaf.path]
        for factor in one.factors
    }
    for name, shape in wanted.items():
        here = short_type(shape, jnp.dtype("float32"))
        if name not in tensors:
            near = did_you_mean(name, [other for other in tensors if other not in wanted])
            yield Problem(name, f"is not in the file; {here} here.{near}")
            continue
        dtype, found = str(tensors[name].get_dtype()), tuple(tensors[name].get_shape())
        if found != shape or dtype not in ("F64", "F32", "F16", "BF16"):
            why = f"is {dtype.lower()}[{','.join(map(str, found))}] in the file, {here} here"
            yield Problem(name, why)
    for name in tensors:
        if name not in wanted:
            fix = _WITHOUT_WEIGHTS if name.endswith(_OWN_WEIGHTS) else ""
            why = "is in the file, and no weight here is adapted under this name"
            yield Problem(name, why, fix)
