"""The manifest of a step: readable, and enough to find any damage."""

import dataclasses
import json
import typing
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .._core.errors import CheckpointCorruptedError, CheckpointError
from .._core.io._files import check_regular
from .._core.options import describe_annotation, matches_annotation
from .._core.tree import short_dtype
from ._fingerprint import raw_array

FORMAT, VERSION = "shardkit checkpoint", 2
MANIFEST = "manifest.json"
_Record = TypeVar("_Record")
# Fields whose values JSON has as lists.
_TUPLES = ("shape", "axes")


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """One array of a saved state."""

    shape: tuple[int, ...]  # global shape
    dtype: str  # name of the element type; `key<...>` for typed PRNG keys
    fingerprint: str  # 16 hexadecimal digits of bits and global index, the same on every mesh
    # logical axis name or None per dim, or None where the model names none
    axes: tuple[str | None, ...] | None = None
    key: str | None = None  # name of the generator of a typed PRNG key, else None

    @property
    def type(self) -> str:
        """Returns `f32[1024,4096]`."""
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"

    @property
    def stored(self) -> jax.ShapeDtypeStruct:
        """Its type on disk: the words of typed keys, and other arrays unchanged.

        Raises TypeError or ValueError for a dtype or generator that JAX does not have.
        """
        if self.key is None:
            dtype = jnp.dtype(self.dtype)
            if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
                raise TypeError(f"{dtype} is not a type of arrays")
            return jax.ShapeDtypeStruct(self.shape, dtype)
        return jax.eval_shape(
            lambda: raw_array(jnp.zeros(self.shape, jax.random.key(0, impl=self.key).dtype))
        )


@dataclasses.dataclass(frozen=True)
class SavedFile:
    """One file of a saved step: its size, and the CRC-32 of its bytes as 8 digits."""

    bytes: int
    crc32: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a saved step besides the arrays.

    Attributes:
      step: updates made when it was saved.
      time: of the save, in UTC.
      versions: of the packages that wrote it.
      mesh: axis sizes it was saved from, for people; restoring does not use it.
      leaves: `{path: SavedLeaf}`.
      files: `{path below the step's folder: SavedFile}`.
      data: state of the data iterator, as the caller gave it.
      config: the run's config, as the caller gave it.
      metrics: numbers that `RetentionPolicy` ranks steps by.
    """

    step: int
    time: str
    versions: Mapping[str, str]
    mesh: Mapping[str, int]
    leaves: Mapping[str, SavedLeaf]
    files: Mapping[str, SavedFile]
    data: Any = None
    config: Any = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_text(self) -> str:
        """Returns the JSON of `manifest.json`, which ends with its own checksum."""
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return _render({**fields, "crc32": _crc(_render(fields))})


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a step's folder.

    Raises CheckpointCorruptedError if it is missing, truncated or changed, CheckpointError if its
    format is newer or older.
    """
    path = folder / MANIFEST
    try:
        check_regular(path)
        text = path.read_bytes().decode()
        fields = json.loads(text)
        # Each content has one rendering, so even a changed space is found.
        unchanged = _render(fields) == text
    except (OSError, ValueError, RecursionError) as error:
        raise _make_error(path, _describe_cause(error)) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _make_error(path, f"is not a manifest of format {FORMAT!r}")
    saved = fields.pop("crc32", None)
    if not unchanged or saved != _crc(_render(fields)):
        raise _make_error(path, f"its checksum is not {saved}: it was changed after it was written")
    version = fields.pop("version", None)
    if version != VERSION:
        why = f"has format version {version}; this shardkit reads {VERSION}"
        is_older = version in range(VERSION)
        fix = "pip install --upgrade shardkit"
        if is_older:
            fix = "export_safetensors, with the shardkit that wrote it; import_safetensors here"
        headline = f"The checkpoint is {'older' if is_older else 'newer'}."
        raise CheckpointError.of(headline, str(path), why, fix)
    del fields["format"]
    manifest = _parse(path, fields)
    named = step_of_name(folder.name)
    if named not in (None, manifest.step):
        why = f"is of step {manifest.step}: the folder was renamed from {step_name(manifest.step)}"
        raise _make_error(path, why)
    return manifest


def step_name(step: int) -> str:
    """Returns the name of the folder of a complete step: `step-00000300`."""
    return f"step-{step:08d}"


def step_of_name(name: str) -> int | None:
    """Returns the step of a folder by its name; None for any other folder.

    >>> step_of_name("step-00000300"), step_of_name("step-300"), step_of_name(".saving-step-1")
    (300, None, None)
    """
    digits = name.removeprefix("step-")
    is_step = digits.isascii() and digits.isdigit() and len(digits) < 20
    return int(digits) if is_step and step_name(int(digits)) == name else None


def _parse(path: Path, fields: Mapping[str, Any]) -> Manifest:
    """Builds a manifest whose every field is of its annotated type."""
    try:
        manifest = _build(Manifest, fields)
        leaves = {name: _build(SavedLeaf, leaf) for name, leaf in fields["leaves"].items()}
        files = {name: _build(SavedFile, file) for name, file in fields["files"].items()}
        for leaf in leaves.values():
            _ = leaf.stored
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _make_error(path, f"has fields that no save writes: {error}") from error
    sizes = [manifest.step, *(file.bytes for file in files.values())]
    sizes += [size for leaf in leaves.values() for size in leaf.shape]
    if min(sizes) < 0 or any(
        Path(name).is_absolute() or ".." in Path(name).parts for name in files
    ):
        raise _make_error(path, "has a negative size, or files outside of its folder")
    return dataclasses.replace(manifest, leaves=leaves, files=files)


def _build(kind: type[_Record], fields: Mapping[str, Any]) -> _Record:
    """Makes a dataclass of JSON values; raises `TypeError` for a field of another type."""
    record = kind(
        **{k: tuple(x) if k in _TUPLES and isinstance(x, list) else x for k, x in fields.items()}
    )
    for name, annotation in typing.get_type_hints(kind).items():
        # The mappings of a manifest hold records that are not built yet.
        annotation = Mapping if name in ("leaves", "files") else annotation
        value = getattr(record, name)
        if not matches_annotation(annotation, value):
            raise TypeError(f"{name}={value!r}, expected {describe_annotation(annotation)}")
    return record


def _render(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _describe_cause(error: OSError | ValueError | RecursionError) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) else f"is not JSON: {error}"


def _make_error(path: Path, why: str) -> CheckpointCorruptedError:
    return CheckpointCorruptedError.of("The checkpoint is damaged.", str(path), why)
