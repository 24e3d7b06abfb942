"""The manifest of a step: readable, and enough to find any damage."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._core.errors import CheckpointCorruptedError, CheckpointError, Problem, format_problems
from .._core.tree import short_dtype

FORMAT, VERSION = "shardkit checkpoint", 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """One array of a saved state.

    Attributes:
      shape: global shape.
      dtype: name of the element type; `key<...>` for typed PRNG keys.
      fingerprint: 16 hexadecimal digits of bits and global index, the same on every mesh.
      axes: logical axis name or None per dim, or None where the model names none.
      key: name of the generator of a typed PRNG key, else None.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str
    axes: tuple[str | None, ...] | None = None
    key: str | None = None

    @property
    def type(self) -> str:
        """Returns `f32[1024,4096]`."""
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"


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

    Raises:
      CheckpointCorruptedError: it is missing, truncated or changed.
      CheckpointError: its format is newer.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        fields = json.loads(text)
    except (OSError, ValueError) as error:
        raise _make_error(path, _describe_cause(error)) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _make_error(path, f"is not a manifest of format {FORMAT!r}")
    # Each content has one rendering, so even a changed space is found.
    unchanged = _render(fields) == text
    saved = fields.pop("crc32", None)
    if not unchanged or saved != _crc(_render(fields)):
        raise _make_error(path, f"its checksum is not {saved}: it was changed after it was written")
    if fields.pop("version") != VERSION:
        version = json.loads(text)["version"]
        why = f"has format version {version}; this shardkit reads {VERSION}"
        problem = Problem(str(path), why)
        fix = "pip install --upgrade shardkit"
        raise CheckpointError(format_problems("The checkpoint is newer.", [problem], fix))
    del fields["format"]
    leaves = {path: _read_leaf(leaf) for path, leaf in fields.pop("leaves").items()}
    files = {name: SavedFile(**file) for name, file in fields.pop("files").items()}
    return Manifest(leaves=leaves, files=files, **fields)


def _read_leaf(fields: Mapping[str, Any]) -> SavedLeaf:
    axes = fields["axes"]
    named = None if axes is None else tuple(axes)
    return SavedLeaf(**{**fields, "shape": tuple(fields["shape"]), "axes": named})


def _render(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _describe_cause(error: OSError | ValueError) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) else f"is not JSON: {error}"


def _make_error(path: Path, why: str) -> CheckpointCorruptedError:
    return CheckpointCorruptedError(
        format_problems("The checkpoint is damaged.", [Problem(str(path), why)])
    )
